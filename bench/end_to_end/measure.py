"""Runs in a process of its own, started by runner.py: trains one arm, and says what that cost.

Seconds are by the wall clock between the ends of optimiser steps, the first of them the last one of the warm-up, so
that collation, metrics and the trainer's own work count. Memory is the peak beyond what the process held before the
model was made, over all of the run.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from common.jobs import Job, serve
from common.memory import memory_of
from common.trainers import CACHE_METHODS, trainer_classes
from end_to_end.arms import ARMS, Arm, Setting, make_trainer
from end_to_end.cases import TrainCase
from end_to_end.data import load_rows, load_tokenizer
from end_to_end.profile import Profile
from transformers import TrainerCallback


class Clock(TrainerCallback):
    """When each optimiser step ended, and how much time of all cores had gone into the process by then."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.ends: list[float] = []
        self.cpu_ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(now(self.device))
        self.cpu_ends.append(time.process_time())


def now(device: str) -> float:
    """Seconds, once all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def train(arm: Arm, setting: Setting, case: TrainCase, folder: Path, profiled: bool) -> dict[str, Any]:
    """Seconds and peak memory of the steps, seconds of the cached reference, and what each step logged."""
    rows = load_rows(folder / arm.file)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    trainer_class, _ = trainer_classes(arm.library)  # importing it is not the run's memory
    build = _time_calls(trainer_class, CACHE_METHODS[arm.library], case.device)
    clock = Clock(case.device)
    memory = memory_of(case.device)
    held = memory.mark()
    # A folder of its own: fastdpo keeps the cached reference there, and would read that of the run before.
    with tempfile.TemporaryDirectory(dir=folder) as output:
        trainer = make_trainer(arm, setting, case, rows, tokenizer, Path(output), [clock])
        profile = Profile(trainer, arm.library, case) if profiled else None
        trainer.train()
        peak = None if held is None else memory.peak() - held
    steps = [b - a for a, b in pairwise(clock.ends[case.warmup - 1 :])]
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "seconds": sum(steps) / len(steps),
        "steps": steps,
        "cpu_seconds": (clock.cpu_ends[-1] - clock.cpu_ends[case.warmup - 1]) / len(steps),
        "peak_bytes": peak,
        "build_seconds": sum(build) / case.rows if arm.cached else None,  # a pair
        "losses": [entry["loss"] for entry in logged],
        "grad_norms": [entry["grad_norm"] for entry in logged],
        "profile": profile.per_step() if profile is not None else None,
    }


def _time_calls(owner: type[Any], name: str, device: str) -> list[float]:
    """The seconds that each call of the method takes, from now on."""
    method: Callable[..., Any] = getattr(owner, name)
    seconds: list[float] = []

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = now(device)
        result = method(*args, **kwargs)
        seconds.append(now(device) - start)
        return result

    setattr(owner, name, timed)
    return seconds


def work(job: Job) -> dict[str, Any]:
    folder = Path(job["folder"])
    return train(ARMS[job["arm"]], job["setting"], TrainCase(**job["case"]), folder, job["profiled"])


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"  # the model is made here; nobody shall look for it
    serve(work, __doc__)
