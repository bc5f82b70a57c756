"""Signals to stop that lose nothing: Ctrl-C, and those by which schedulers announce that they end a job."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy

from fastdpo.errors import HUNG_UP, INTERRUPTED, TERMINATED, Stopped
from fastdpo.trainer.evaluations import EvaluationCut

# SIGUSR1 is what job scripts have the scheduler send some time before its SIGTERM. One exit code for both: that of a
# run that was told to end, and can go on. SIGHUP comes when a terminal is closed; under nohup nobody hears of it.
EXIT_CODES = {
    signal.SIGINT: INTERRUPTED,
    signal.SIGTERM: TERMINATED,
    signal.SIGUSR1: TERMINATED,
    signal.SIGHUP: HUNG_UP,
}

Handler = Callable[[int, "FrameType | None"], Any]


@contextmanager
def stopping_on_signals() -> Iterator[None]:
    """SIGTERM, SIGUSR1 and SIGHUP raise :class:`Stopped`, where they would end the process without a word."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(_name(number), EXIT_CODES[signal.Signals(number)])

    with _handling({number: stop for number in EXIT_CODES if number != signal.SIGINT}):
        yield


def _name(number: int) -> str:
    return signal.Signals(number).name


@contextmanager
def _handling(handlers: dict[signal.Signals, Handler]) -> Iterator[None]:
    before: dict[signal.Signals, Any] = {}
    try:
        for number, handler in handlers.items():
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class GentleStop(TrainerCallback):
    """The first signal lets the step end and saves a checkpoint; a second Ctrl-C stops at once.

    Attributes:
        stopped_at: the step after which the run was stopped; None where it was not.
        exit_code: what the command ends with then; on several processes the same in all.
        evaluation_owed: one was due, or begun, and gave way to the checkpoint.
    """

    def __init__(self) -> None:
        self.asked = 0  # the signal's number
        self.stopped_at: int | None = None
        self.exit_code = INTERRUPTED
        self.evaluation_owed = False
        self._has_trained = False
        self._agreement: _Agreement | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals over for the duration of the run."""
        with _handling(dict.fromkeys(EXIT_CODES, self._on_signal)):
            yield

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self.asked:
            name, again = (
                ("", " Ctrl-C again stops at once.") if number == signal.SIGINT else (f"{_name(number)}. ", "")
            )
            # Nobody may be there any more to read it; or the signal came in the middle of another line.
            with contextlib.suppress(OSError, RuntimeError):
                print(f"\n{name}Stopping after this step, with a checkpoint.{again}", file=sys.stderr, flush=True)
        self.asked = number

    def on_pre_optimizer_step(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self._has_trained = True
        if args.world_size > 1:
            self._agreement = _Agreement(self.asked, args.device)

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        heard = self._heard(args)
        if not heard:
            return
        control.should_log = control.should_save = control.should_training_stop = True
        self._stop_at(state, heard)
        if self._is_midway(state):
            ends_epoch = args.eval_strategy == IntervalStrategy.EPOCH and state.epoch == int(state.epoch)
            self.evaluation_owed = control.should_evaluate or ends_epoch
            control.should_evaluate = False

    def on_epoch_end(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        if self._is_midway(state):  # all of it was done at the end of the step, or is owed
            control.should_evaluate = control.should_save = False

    def on_prediction_step(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        """Cuts an evaluation off; but for the one at the end, and one that is being made up before the first step."""
        if not self._has_trained or state.global_step >= state.max_steps:
            return
        heard = self._heard(args)
        if args.world_size > 1:
            self._agreement = _Agreement(self.asked, args.device)  # heard of one step late
        if heard:
            self._agreement = None
            self._stop_at(state, heard)
            self.evaluation_owed = True
            raise EvaluationCut

    def on_evaluate(self, args: TrainingArguments, state: Any, control: Any, **_: Any) -> None:
        self._agreement = None

    def _heard(self, args: TrainingArguments) -> int:
        """The signal that all agree on; 0 for none."""
        agreement, self._agreement = self._agreement, None
        return self.asked if args.world_size == 1 else 0 if agreement is None else agreement.outcome()

    def _stop_at(self, state: Any, heard: int) -> None:
        self.stopped_at, self.exit_code = state.global_step, EXIT_CODES[signal.Signals(heard)]

    def _is_midway(self, state: Any) -> bool:
        return self.stopped_at is not None and self.stopped_at < state.max_steps


class _Agreement:
    """Processes hear of a signal at different moments, and all must leave after the same step: the largest number wins.

    It is asked before the optimiser's step and heard after it, so that a device has that step to do meanwhile.
    """

    def __init__(self, number: int, device: torch.device) -> None:
        asked = torch.tensor(number, device=device)
        self._work = torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX, async_op=True)
        self._work.wait()  # on a device, its stream does, and not this process
        self._asked = asked.to("cpu", non_blocking=True)
        self._is_there = torch.Event(device) if device.type != "cpu" else None
        if self._is_there is not None:
            self._is_there.record()

    def outcome(self) -> int:
        """What all agree on; 0 where nobody was asked to stop."""
        if self._is_there is not None:
            self._is_there.synchronize()
        return int(self._asked)
