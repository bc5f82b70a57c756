"""What ``fastdpo train`` records for the report of a run, and when."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from fastdpo.report.facts import command_line, device_name, environment
from fastdpo.report.page import write_report
from fastdpo.report.picture import draw_training
from fastdpo.report.record import RunRecord
from fastdpo.report.snapshot import Snapshot, SnapshotSize
from fastdpo.report.snapshot_taker import SnapshotTaker, take_start
from fastdpo.trainer.checkpoints import find_checkpoints
from fastdpo.trainer.trainer import DPOTrainer

_REFERENCE_MOVES = (
    "The reference followed the policy (sync_ref_model): rewards are measured against what it was at each time, so "
    "that they fall where it moved."
)
REPORT_FILE, PICTURE_FILE = "report.html", "training.png"


class RunReport:
    """Looks at the policy before the first step and after the last one, and writes ``report.html`` of the run.

    Args:
        trainer: of the run, before training.
        size: how much to look at.
        title: of the report.
        settings: all that are in force, by name.
        changed: those that are not at their default, with it.
        argv: the words after ``fastdpo train``.
        checkpoint: where the run goes on from; None at its start.
    """

    def __init__(
        self,
        trainer: DPOTrainer,
        size: SnapshotSize,
        *,
        title: str,
        settings: dict[str, Any],
        changed: dict[str, tuple[Any, Any]],
        argv: Sequence[str],
        checkpoint: Path | None,
    ) -> None:
        self._trainer, self._title = trainer, title
        self._settings, self._changed, self._argv = settings, changed, argv
        self._output_dir = trainer.args.folder
        self._resumed = checkpoint is not None
        self._taker = SnapshotTaker(trainer, size)
        self._start = take_start(self._taker, self._output_dir, checkpoint)

    def write(self, seconds: float | None = None, *, look: bool = True, notes: Sequence[str] = ()) -> None:
        """Write the report and the picture of the run as it stands.

        Args:
            seconds: that this process trained for.
            look: at the policy as it is now, which takes a moment; else the report does without.
            notes: what else there is to say.
        """
        end, notes = None, [*notes, *self._notes()]
        if look:
            try:
                end = self._taker.take(like=self._start)
            except KeyboardInterrupt:
                notes.append("The look at the policy when the run stopped was itself stopped.")
        trainer = self._trainer
        draw_training(trainer.state.log_history, self._output_dir / PICTURE_FILE, title=self._title)
        write_report(self._record(end, notes, seconds), self._output_dir / REPORT_FILE)

    def _notes(self) -> list[str]:
        moves = [_REFERENCE_MOVES] if self._trainer.args.sync_ref_model else []
        return moves + self._notes_of_start()

    def _notes_of_start(self) -> list[str]:
        if self._resumed and self._start is None:
            return [
                "This run was resumed, and what the policy was like at its start is not on record: the folder has no "
                "record of the same rows and sizes."
            ]
        return []

    def _record(self, end: Snapshot | None, notes: list[str], seconds: float | None) -> RunRecord:
        trainer, state = self._trainer, self._trainer.state
        return RunRecord(
            title=self._title,
            log_history=state.log_history,
            step=state.global_step,
            max_steps=state.max_steps,
            device=device_name(trainer.args.device),
            batches=str(trainer.packing),
            command=command_line(self._argv),
            loss=" + ".join(trainer.args.loss_type),
            has_reference=trainer.args.loss_options.takes_reference,
            first_step=getattr(trainer, "_initial_global_step", 0),
            seconds=seconds,
            whole_seconds=time.time() - psutil.Process().create_time(),
            start=self._start,
            end=end,
            summaries=trainer.data_summaries,
            changed=self._changed,
            settings=self._settings,
            environment=environment(trainer.args.device, trainer.args.world_size),
            resume_command=resume_command(self._argv) if find_checkpoints(self._output_dir) else None,
            notes=notes,
        )


def resume_command(argv: Sequence[str]) -> str:
    """What to type to go on with a run from its last checkpoint."""
    words, before = _without_resume(argv)
    # A job script's command is the one that goes on.
    return command_line([*words, "--resume_from_checkpoint", "auto" if before == ["auto"] else "last"])


def _without_resume(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words without that flag, and what it was given."""
    words, given, skip = [], [], False
    for word in argv:
        name = word.split("=")[0].replace("-", "_").strip("_")
        if name == "resume_from_checkpoint" and word.startswith("--"):
            skip = "=" not in word
            given += word.split("=")[1:]
        elif skip:
            skip = False
            given.append(word)
        else:
            words.append(word)
    return words, given
