"""``transformers.Trainer``, whose checkpoints say what is in them, and whose resumed runs have it or stop."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints
from transformers.utils import logging as transformers_logging

from fastdpo.data.row_digests import numbers_fingerprint, row_digests, rows_fingerprint
from fastdpo.data.terms import MARGIN_COLUMN, WEIGHT_COLUMN, is_prepared
from fastdpo.model.adapters import has_transformers_adapter
from fastdpo.model.load_sharding import is_load_sharded
from fastdpo.trainer import fsdp1
from fastdpo.trainer.checkpoints import last_whole, refuse_damaged
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.digests import WeightDigests
from fastdpo.trainer.evaluations import YieldingEvaluations
from fastdpo.trainer.fsdp1_loading import load_adapter
from fastdpo.trainer.leftovers import writing_into
from fastdpo.trainer.manifest import read_manifest, write_manifest
from fastdpo.trainer.optimizers import settle_weights, state_classes
from fastdpo.trainer.resume_settings import compare_settings, follow_settings, settings_of
from fastdpo.trainer.weights import check_weights, load_adapter_weights, load_weights

logger = logging.getLogger(__name__)

# What Trainer does at the end of a checkpoint, and what we do after the manifest.
_DEFERRED = {"push_to_hub": False, "save_total_limit": None}


class ResumableRuns(YieldingEvaluations):
    """``transformers.Trainer``, which brings back those weights whose names happen to fit, and asks no questions.

    A checkpoint ends with a manifest (:mod:`fastdpo.trainer.manifest`). A resume looks whether all of its files are as
    they were written, whether the run is the same (:mod:`fastdpo.trainer.resume_settings`), and, once the weights are
    loaded, whether they are those that were saved.
    """

    args: DPOConfig
    model: PreTrainedModel | PeftModel  # Trainer says that it may be None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._digests = WeightDigests()
        self._rows: dict[str, Any] | None = None
        self._deferred: dict[str, Any] = {}
        self._changed: set[str] = set()

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As ``Trainer``'s.

        Args:
            resume_from_checkpoint: a folder, or True for the last checkpoint in ``args.output_dir`` that is whole.
            args, kwargs: as ``Trainer``'s.

        Raises:
            InputError: there is no such checkpoint, it is damaged, or it is of another run; the message says what.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_whole(self.args.folder))
        elif resume_from_checkpoint:
            refuse_damaged(Path(resume_from_checkpoint))
        if resume_from_checkpoint:
            self._check_settings(Path(resume_from_checkpoint))
        output: TrainOutput = super().train(resume_from_checkpoint or None, *args, **kwargs)
        return output

    def _check_settings(self, checkpoint: Path) -> None:
        manifest = read_manifest(checkpoint)
        if manifest is None:
            logger.warning(
                "%s has no manifest: another program or an older version wrote it. Neither its weights nor its "
                "settings can be compared with what was saved.",
                checkpoint,
            )
            return
        lines = compare_settings(manifest.settings, self.args, manifest.rows, self._train_rows(), self.model)
        now = settings_of(self.args, self.model)
        self._changed = {name for name, value in now.items() if manifest.settings.get(name, value) != value}
        if lines and self.is_world_process_zero():
            step = checkpoint.name.rpartition("-")[2]
            logger.warning("From step %s on, otherwise than before: %s.", step, "; ".join(lines))

    def _train_rows(self) -> dict[str, Any]:
        rows = self.train_dataset
        if not isinstance(rows, Dataset) or not is_prepared(rows.column_names):
            return {}
        if self._rows is None:
            self._rows = {
                "count": len(rows),
                "fingerprint": rows_fingerprint(row_digests(rows)),
                "weights": numbers_fingerprint(rows, WEIGHT_COLUMN),
                "margins": None if self.args.margin_alpha is None else numbers_fingerprint(rows, MARGIN_COLUMN),
            }
        return self._rows

    # ----------------------------------------------------------------------------------------------------------------
    # Saving
    # ----------------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = self._get_output_dir(trial)
        folder = Path(run_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with writing_into(folder) if self.args.should_save else contextlib.nullcontext():
            with self._deferring():
                super()._save_checkpoint(model, trial)
            self.save_beside(folder)
            if self.args.world_size > 1:
                torch.distributed.barrier()  # the other processes' files
            sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled or is_load_sharded(self.model)
            if self.args.should_save or sharded:
                weights = self._digests.of(self.model)  # which asks all processes where FSDP shards them
            if self.args.should_save:
                facts: dict[str, Any] = {
                    "weights": weights,
                    "settings": settings_of(self.args, self.model),
                    "rows": self._train_rows(),
                }
                write_manifest(folder, **facts, evaluation_owed=self.evaluation_owed)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            # Not before the new one is whole; by their steps, for clocks differ between machines.
            rotate_checkpoints(
                output_dir=run_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As ``Trainer``'s; the weights are those that are evaluated, also where none were evaluated before."""
        settle_weights(self.optimizer)
        super().save_model(output_dir, _internal_call)

    def save_beside(self, checkpoint: Path) -> None:
        """Write what a checkpoint holds beside the model and the optimiser; in all processes, one of which saves."""

    def load_beside(self, checkpoint: Path) -> None:
        """Take what :meth:`save_beside` wrote, in all processes, once the model is loaded."""

    @contextlib.contextmanager
    def _deferring(self) -> Iterator[None]:
        self._deferred = {name: getattr(self.args, name) for name in _DEFERRED}
        self._set(_DEFERRED)
        try:
            yield
        finally:
            self._set(self._deferred)
            self._deferred = {}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # It writes the arguments, which should be the run's.
        self._set(self._deferred)
        try:
            super()._save(output_dir, state_dict)
        finally:
            if self._deferred:
                self._set(_DEFERRED)

    def _set(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(self.args, name, value)

    # ----------------------------------------------------------------------------------------------------------------
    # Resuming
    # ----------------------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoint = Path(resume_from_checkpoint)
        if fsdp1.has_adapter(self.model):
            load_adapter(self.model, checkpoint)
        elif self.is_fsdp_enabled or isinstance(self.model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        elif has_transformers_adapter(self.model):
            load_adapter_weights(self.model, checkpoint)
        else:
            load_weights(self.model, checkpoint)
        self._compare_weights(checkpoint)

    def _compare_weights(self, checkpoint: Path) -> None:
        """The weights that were loaded with what the checkpoint says of them."""
        manifest = read_manifest(checkpoint)
        if manifest is not None:
            check_weights(self.model, manifest.weights, checkpoint, self._digests)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer: Any = self.optimizer
        fresh = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        with torch.serialization.safe_globals(state_classes(self.args)):
            super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self.load_beside(Path(checkpoint))
        if self.is_deepspeed_enabled:
            self._compare_weights(Path(checkpoint))  # which were loaded together with the optimiser's state
        if self._changed:
            follow_settings(optimizer, self.lr_scheduler, fresh, self._changed)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        with _without_lines_about("recorded in the resumed state does not exist"):  # which need not be so
            found = super()._init_training_state(*args, **kwargs)
        step = self.state.best_global_step
        if self.state.global_step and step:
            self.state.best_model_checkpoint = self._best_at(step)
        return found

    def _best_at(self, step: int) -> str | None:
        """The best checkpoint so far, as this run calls it: its folder may have been moved, or named otherwise."""
        best = self.args.folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if best.is_dir():
            return str(best)
        if self.state.best_model_checkpoint is None:
            self.state.best_metric = self.state.best_global_step = None
            if self.is_world_process_zero():
                logger.warning("%s, the best checkpoint so far, is gone; the best of those to come is chosen.", best)
        return self.state.best_model_checkpoint

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        # Trainer deletes the last checkpoint where only one is kept, and it is not the best. A run that was told to
        # stop goes on from it, and one that is done knows by it that it is.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            output: TrainOutput = super()._finalize_training(*args, **kwargs)  # type: ignore[no-untyped-call]
        finally:
            self.args.save_total_limit = limit
        return output

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if best is None:
            super()._load_best_model()
            if best is not None:
                self.load_beside(Path(best))
            return
        if self.is_deepspeed_enabled:
            super()._load_best_model()
            self._compare_weights(Path(best))
        else:
            logger.info("Loading the best model from %s (%s).", best, self.state.best_metric)
            self._load_from_checkpoint(best)
        self.load_beside(Path(best))  # what moved with the model is what it was beside it


@contextlib.contextmanager
def _without_lines_about(words: str) -> Iterator[None]:
    """Lines that transformers' trainer would log, and we have better ones for."""
    log = transformers_logging.get_logger("transformers.trainer")

    class Others(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            return words not in record.getMessage()

    others = Others()
    log.addFilter(others)
    try:
        yield
    finally:
        log.removeFilter(others)
