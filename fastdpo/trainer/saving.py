"""``transformers.Trainer``, whose saves hold no secrets, and leave nothing torn where the disk is full."""

from __future__ import annotations

import contextlib
import logging
import math
import shutil
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from torch.nn import Module
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, TrainOutput

from fastdpo.model.load_sharding import is_load_sharded
from fastdpo.trainer.checkpoints import find_checkpoints, find_torn
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.disk import (
    NotWrittenError,
    checkpoint_bytes,
    folder_bytes,
    free_bytes,
    size_in_words,
    why_not_written,
)
from fastdpo.trainer.json_files import read_object
from fastdpo.trainer.leftovers import writing_into
from fastdpo.trainer.run_lock import only_run_in
from fastdpo.trainer.secrets import without_secrets

logger = logging.getLogger(__name__)


class CarefulSaves(Trainer):
    """``transformers.Trainer``, which writes its arguments with the tokens in them, and what a full disk lets it."""

    args: DPOConfig
    model: PreTrainedModel | PeftModel  # Trainer says that it may be None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.add_callback(_RoomAtTheStart(self))

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As ``Trainer``'s; raises where another process trains in ``args.output_dir``."""
        with only_run_in(self.args.folder, is_main=self.is_world_process_zero()):
            return super().train(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As ``Trainer``'s."""
        folder = Path(output_dir) if output_dir else self.args.folder
        with writing_into(folder) if self.args.should_save else contextlib.nullcontext():
            super().save_model(output_dir, _internal_call)

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """As ``Trainer``'s, which adds to ``all_results.json`` what it finds; what a killed run left half of goes."""
        path = self.args.folder / "all_results.json"
        if combined and self.is_world_process_zero() and path.exists() and read_object(path) is None:
            logger.warning("%s is damaged, and written anew.", path)
            path.unlink()
        super().save_metrics(split, metrics, combined)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # It writes training_args.bin, which is read back by people, and by other runs that have tokens of their own.
        args = self.args
        self.args = without_secrets(args)
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.args = args

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = self.args.folder
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            self.check_room(1, f"{checkpoint} was not begun")
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            why = why_not_written(error)
            if why is None:
                raise
            if self.args.should_save and checkpoint in find_torn(folder):
                shutil.rmtree(checkpoint, ignore_errors=True)
            raise NotWrittenError(f"{checkpoint} could not be written: {why}. {kept(folder)}") from error

    def check_room(self, count: int, what: str) -> None:
        """Raises unless there is room for so many checkpoints.

        Args:
            count: checkpoints.
            what: is not done for want of it.

        Raises:
            NotWrittenError: the room does not suffice.
        """
        needed = count * self._bytes_of_a_checkpoint()
        if (free := free_bytes(self.args.folder)) < needed:
            raise NotWrittenError(
                f"{what}: a checkpoint takes {size_in_words(needed // count)}, and {size_in_words(free)} are free in "
                f"{self.args.folder}. {kept(self.args.folder)}"
            )

    def _bytes_of_a_checkpoint(self) -> int:
        """As the last one; or at least, where there is none yet. 0 where its parts are spread over processes."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or is_load_sharded(self.model):
            return 0
        last = find_checkpoints(self.args.folder)[-1:]
        if last and int(last[0].name.rpartition("-")[2]) <= self.state.global_step:
            return folder_bytes(last[0])
        optimizer = None if self.args.save_only_model else self.optimizer
        whole = checkpoint_bytes(cast(Module, self.model), optimizer, is_adapter=isinstance(self.model, PeftModel))
        return whole + self.bytes_beside()

    def bytes_beside(self) -> int:
        """What a checkpoint holds beside the model and the optimiser."""
        return 0


class _RoomAtTheStart(TrainerCallback):
    """Looks, before the first step, whether what the run will write has room."""

    def __init__(self, trainer: CarefulSaves) -> None:
        self._trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl | None:
        saves = _saves(args, state)
        if not saves or not args.should_save:
            return None
        trainer = self._trainer
        trainer.check_room(1, "the run was not begun")
        each = trainer._bytes_of_a_checkpoint()
        # The new one is written before an old one goes.
        most = min(saves, args.save_total_limit + 1) if args.save_total_limit else saves
        if each and (room := free_bytes(trainer.args.folder) // each) < most:
            keep = f" --save_total_limit {room - 1} would keep the last ones alone." if room > 1 else ""
            logger.warning(
                "The run comes to %d checkpoints of about %s, and there is room for %d in %s.%s",
                most,
                size_in_words(each),
                room,
                trainer.args.folder,
                keep,
            )
        return None


def _saves(args: TrainingArguments, state: TrainerState) -> int:
    """How many checkpoints the run comes to from where it is."""
    if args.save_strategy == SaveStrategy.STEPS and state.save_steps:
        return math.ceil((state.max_steps - state.global_step) / state.save_steps)
    if args.save_strategy == SaveStrategy.EPOCH:
        return math.ceil(state.num_train_epochs - (state.epoch or 0))
    return 1 if args.save_strategy != SaveStrategy.NO else 0


def kept(folder: Path) -> str:
    """What there is in a run's folder after something could not be written, and what to do, in words."""
    last = find_checkpoints(folder)[-1:]
    there = f"{last[0]} is whole" if last else "There is no checkpoint before it"
    return f"{there}. Make room, or name another output_dir (--output_dir); --save_total_limit N keeps the last N alone"
