"""Runs in a process of its own, started by runner.py: makes a case's tensors, or measures one peer on them."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common.jobs import Job, serve
from common.memory import memory_of
from loss_layer.cases import BETA, Case
from loss_layer.peers import PEERS, Peer, load_peer_file
from loss_layer.problem import Outcome, Problem
from loss_layer.tensors import load_problem, make_problem, save_problem
from loss_layer.truth import Truth, compute_truth, errors

_REPEAT_SECONDS = 1.0  # a step is repeated until about this long is spent, so that cheap cases are not all noise
_MOST_REPEATS = 30


def timed(peer: Peer, problem: Problem) -> tuple[float, Outcome | None]:
    """Seconds of a step by the wall clock, or by the device's events, and its outcome."""
    if problem.case.device != "cuda":
        begin = time.perf_counter()
        outcome = peer.run(problem)
        return time.perf_counter() - begin, outcome
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    outcome = peer.run(problem)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3, outcome


def measure(peer: Peer, problem: Problem, truth: Truth | None) -> dict[str, Any]:
    """Median seconds of a step, its peak memory beyond inputs and gradients, and its errors."""
    memory = memory_of(problem.case.device)
    peer.prepare(problem)
    peer.run(problem)  # on the real shapes: loads, compiles and tunes what is done once
    problem.clear_gradients()
    held = memory.mark()
    seconds, outcome = timed(peer, problem)
    peak = None if held is None else memory.peak() - held
    gradients = [tensor.grad for tensor in (problem.hidden, problem.weight) if tensor.grad is not None]
    found = None
    if outcome is not None:
        if peak is not None:
            peak -= sum(gradient.numel() * gradient.element_size() for gradient in gradients)
        if truth is not None:
            outcome.token_logps = peer.token_logps(problem, outcome)
            found = errors(truth, problem, outcome)
    repeats = [seconds]
    for _ in range(min(_MOST_REPEATS, int(_REPEAT_SECONDS / seconds)) - 1):
        problem.clear_gradients()
        repeats.append(timed(peer, problem)[0])
    return {"seconds": statistics.median(repeats), "repeats": repeats, "peak_bytes": peak, "errors": found}


def prepare(folder: Path, case: Case, with_truth: bool) -> dict[str, Any]:
    """Writes the case's tensors, and the truth, where measuring processes find them."""
    problem = make_problem(case)
    save_problem(problem, folder / "problem.pt")
    if not with_truth:
        return {}
    truth = compute_truth(problem, BETA)
    torch.save(vars(truth), folder / "truth.pt")
    return {"loss": truth.loss}


def work(job: Job) -> dict[str, Any]:
    folder = Path(job["folder"])
    if job["peer"] is None:
        return prepare(folder, Case(**job["case"]), job["errors"])
    if job["peer_file"]:
        load_peer_file(Path(job["peer_file"]))
    problem = load_problem(folder / "problem.pt", job["device"])
    truth_file = folder / "truth.pt"
    truth = Truth(**torch.load(truth_file, map_location=job["device"])) if truth_file.exists() else None
    peer = PEERS[job["peer"]](**job["setting"])
    return measure(peer, problem if peer.takes_pairs else problem.in_rows(), truth)


if __name__ == "__main__":
    serve(work, __doc__)
