"""``transformers.Trainer``, whose evaluations give way to a checkpoint where a run is told to stop, and are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from fastdpo.trainer.manifest import read_manifest


class EvaluationCut(Exception):
    """Raised by a callback in the midst of an evaluation: there is no time for the rest of it."""


class YieldingEvaluations(Trainer):
    """``transformers.Trainer``, which evaluates before it saves, however soon the machine is taken back.

    A callback says that an evaluation was left out, or raises :class:`EvaluationCut` in it, and has ``evaluation_owed``
    true then. The checkpoint takes note of it, and who goes on from there begins with that evaluation, so that
    schedules and the choice of the best checkpoint see what they would have seen.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._owed_by: str | None = None  # a checkpoint's folder
        self.add_callback(_OwedFirst(self))

    @property
    def evaluation_owed(self) -> bool:
        """Whether one was due at this step, and was not made."""
        return any(getattr(callback, "evaluation_owed", False) for callback in self.callback_handler.callbacks)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ``Trainer``'s, of a checkpoint by its name."""
        self._owed_by = None
        if isinstance(resume_from_checkpoint, str):
            manifest = read_manifest(Path(resume_from_checkpoint))
            if manifest is not None and manifest.evaluation_owed:
                self._owed_by = resume_from_checkpoint
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def make_up_evaluation(self) -> None:
        """The one that the checkpoint was written without, if there is one."""
        if self._owed_by is None:
            return
        checkpoint, self._owed_by = self._owed_by, None
        if self._determine_best_metric(self._evaluate(None, None), None) and self.args.save_strategy != SaveStrategy.NO:
            self.state.best_model_checkpoint = checkpoint

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        try:
            metrics: dict[str, float] = super()._evaluate(*args, **kwargs)
        except EvaluationCut:
            self.control.should_save = self.control.should_training_stop = True
            return {}
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        if not metrics:
            return True  # with save_strategy "best", what it is saved by
        is_best: bool = super()._determine_best_metric(metrics, trial)
        return is_best


class _OwedFirst(TrainerCallback):
    def __init__(self, trainer: YieldingEvaluations) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl | None:
        self._trainer.make_up_evaluation()
        return None
