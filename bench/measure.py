"""Runs in a process of its own, started by runner.py: makes a case's tensors, or measures one peer on them."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import statistics
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from cases import BETA, Case, Problem, load_problem, make_problem, save_problem
from peers import PEERS, Outcome, Peer, load_peer_file
from truth import Truth, compute_truth, errors

_REPEAT_SECONDS = 1.0  # a step is repeated until about this long is spent, so that cheap cases are not all noise
_MOST_REPEATS = 30


class CPU:
    """Wall clock, and the process's resident memory where the system tells it (Linux)."""

    @staticmethod
    def timed(peer: Peer, problem: Problem) -> tuple[float, Outcome | None]:
        start = time.perf_counter()
        outcome = peer.run(problem)
        return time.perf_counter() - start, outcome

    @staticmethod
    def mark() -> int | None:
        """Forgets the peak so far and returns the memory held now, in bytes."""
        gc.collect()
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what was freed before shall not hide what is allocated next
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            return _resident("VmRSS")
        return None

    @staticmethod
    def peak() -> int:
        return _resident("VmHWM")


class CUDA:
    """Events, and the allocator's own count."""

    @staticmethod
    def timed(peer: Peer, problem: Problem) -> tuple[float, Outcome | None]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        outcome = peer.run(problem)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3, outcome

    @staticmethod
    def mark() -> int | None:
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    @staticmethod
    def peak() -> int:
        return torch.cuda.max_memory_allocated()


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def measure(peer: Peer, problem: Problem, truth: Truth | None) -> dict[str, Any]:
    """Median seconds of a step, its peak memory beyond inputs and gradients, and its errors."""
    device = CUDA if problem.case.device == "cuda" else CPU
    peer.prepare(problem)
    peer.run(problem)  # on the real shapes: loads, compiles and tunes what is done once
    problem.clear_gradients()
    held = device.mark()
    seconds, outcome = device.timed(peer, problem)
    peak = None if held is None else device.peak() - held
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
        repeats.append(device.timed(peer, problem)[0])
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("job", type=json.loads)
    job = parser.parse_args().job
    with suppress(OSError):  # if memory runs out, this process shall go and no other
        Path("/proc/self/oom_score_adj").write_text("1000")
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    folder = Path(job["folder"])
    try:
        if job["peer"] is None:
            result = prepare(folder, Case(**job["case"]), job["errors"])
        else:
            if job["peer_file"]:
                load_peer_file(Path(job["peer_file"]))
            problem = load_problem(folder / "problem.pt", job["device"])
            truth_file = folder / "truth.pt"
            truth = Truth(**torch.load(truth_file, map_location=job["device"])) if truth_file.exists() else None
            result = measure(PEERS[job["peer"]](**job["setting"]), problem, truth)
    except Exception as error:
        # Whatever a peer raises is its result: the run goes on.
        result = {"failed": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}
    (folder / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
