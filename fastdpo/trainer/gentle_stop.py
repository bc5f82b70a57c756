"""Ctrl-C that loses nothing."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments


class GentleStop(TrainerCallback):
    """The first Ctrl-C lets the step end and saves a checkpoint; the second stops at once."""

    def __init__(self) -> None:
        self.asked = False
        self.stopped_at: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take Ctrl-C over for the duration of the run."""
        before = signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _on_signal(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        print("\nStopping after this step, with a checkpoint. Ctrl-C again stops at once.", file=sys.stderr)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if self._anyone_asked(args):
            control.should_log = control.should_save = control.should_training_stop = True
            self.stopped_at = state.global_step

    def _anyone_asked(self, args: TrainingArguments) -> bool:
        if args.world_size == 1:
            return self.asked
        # Processes hear of the signal at different moments; all must leave after the same step.
        asked = torch.tensor(float(self.asked), device=args.device)
        torch.distributed.all_reduce(asked)
        return bool(asked.item())
