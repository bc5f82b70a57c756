"""How fast a run is and how much memory it took, told with its other metrics."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState, TrainingArguments

GIB = 2**30


def peak_memory() -> int:
    """The most bytes this process has held: allocated on the CUDA device in use; else resident, libraries included."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Throughput(TrainerCallback):
    """Wall-clock time of the steps since the last log: data loading included, evaluation and checkpoints left out.

    It reads the host's clock and nothing else. Logging waits for the device anyway, to read the loss, so that from one
    log to the next the host's time is the device's.
    """

    def __init__(self) -> None:
        self._since: float | None = None  # the start of what is measured
        self._mark = 0.0  # the last moment that belonged to a step
        self._left_out = 0.0
        self._tokens = 0

    def rates(self, pairs: float, tokens_seen: int | None) -> dict[str, float]:
        """Metrics of the steps since the last call, to be logged; of all processes, but the memory is this one's.

        Args:
            pairs: trained on since the last call.
            tokens_seen: of their sequences, since the run's very first step; None where nobody counts.
        """
        now = time.perf_counter()
        rates: dict[str, float] = {}
        if self._since is not None:
            seconds = max(now - self._since - self._left_out, 1e-9)
            rates["pairs_per_second"] = pairs / seconds
            if tokens_seen is not None:
                rates["tokens_per_second"] = (tokens_seen - self._tokens) / seconds
        rates["peak_memory_gib"] = peak_memory() / GIB
        self._since, self._mark, self._left_out = now, now, 0.0
        self._tokens = tokens_seen or 0
        return rates

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        self._since = None

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        if self._since is None:  # whatever came before: resuming, the evaluation at the start
            self._since, self._left_out = time.perf_counter(), 0.0
            self._tokens = state.num_input_tokens_seen

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        self._mark = time.perf_counter()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        self._leave_out()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **_: Any) -> None:
        self._leave_out()

    def _leave_out(self) -> None:
        # Both come right after a step or its log, and end here.
        now = time.perf_counter()
        self._left_out += now - self._mark
        self._mark = now
