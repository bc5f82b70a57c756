"""``transformers.Trainer``, whose saves are whole where FSDP or DeepSpeed shards the model."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import Any

from transformers import Trainer

from fastdpo.trainer import fsdp1, fsdp2, zero


class ShardedSaves(Trainer):
    """``transformers.Trainer``, which saves less than the model where processes share it, and does not say so."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As ``Trainer``'s; where FSDP or DeepSpeed shards the model, whole weights also if checkpoints hold shards."""
        with contextlib.nullcontext() if _internal_call else self._whole_weights(), fsdp1.plain_names(self.model):
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, *args: Any, **kwargs: Any) -> None:
        with fsdp1.plain_names(self.model):  # it saves shards of the model, too
            super()._save_optimizer_and_scheduler(*args, **kwargs)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        fsdp1.refuse_loading(self.accelerator, self.model)
        super()._load_from_checkpoint(*args, **kwargs)

    def _whole_weights(self) -> AbstractContextManager[None]:
        if self.is_fsdp_enabled:
            return fsdp2.whole_weights(self.accelerator)
        return contextlib.nullcontext() if self.deepspeed is None else zero.whole_weights(self.deepspeed)
