"""``transformers.Trainer``, whose saves are whole where FSDP or DeepSpeed shards the model."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any, cast

from accelerate.optimizer import AcceleratedOptimizer
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from fastdpo.trainer import fsdp1, fsdp2, zero
from fastdpo.trainer.fsdp1_loading import make_state, refuse_loading


class ShardedSaves(Trainer):
    """``transformers.Trainer``, which saves less than the model where processes share it, and does not say so."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As ``Trainer``'s."""
        if resume_from_checkpoint:
            refuse_loading(getattr(self.accelerator.state, "fsdp_plugin", None))  # there with FSDP alone
        output: TrainOutput = super().train(resume_from_checkpoint, *args, **kwargs)
        return output

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As ``Trainer``'s; where FSDP or DeepSpeed shards the model, whole weights also if checkpoints hold shards."""
        # A checkpoint's adapter is read from the file that PEFT makes of it, whatever else is in shards.
        is_whole = not _internal_call or fsdp1.has_adapter(self.model)
        with self._whole_weights() if is_whole else contextlib.nullcontext(), fsdp1.plain_names(self.model):
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, *args: Any, **kwargs: Any) -> None:
        with fsdp1.plain_names(self.model):  # it saves shards of the model, too
            super()._save_optimizer_and_scheduler(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and isinstance(self.model, FullyShardedDataParallel):
            make_state(self.model, cast(AcceleratedOptimizer, self.optimizer).optimizer)
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.deepspeed is not None:  # which has loaded its state before
            zero.catch_up(self.deepspeed)

    def _whole_weights(self) -> AbstractContextManager[None]:
        if self.is_fsdp_enabled:
            return fsdp2.whole_weights(self.accelerator)
        return contextlib.nullcontext() if self.deepspeed is None else zero.whole_weights(self.deepspeed)
