"""``transformers.Trainer``, whose runs of a model that ``from_pretrained`` spread over processes can be gone on with.

Trainer keeps no optimiser state of such models, and refuses checkpoints that would have one. What it writes of the
weights is whole, and is read into parts again by :func:`fastdpo.trainer.weights.load_weights`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, Trainer

from fastdpo.model.load_sharding import is_load_sharded
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.fsdp2 import reshard
from fastdpo.trainer.optimizer_parts import load_parts, save_parts, schedule_for

# Where a checkpoint has the optimiser's state, and, as Trainer writes it, the schedule's.
_OPTIMIZER = "optimizer_parts"
_SCHEDULE = "scheduler.pt"


class CutModelRuns(Trainer):
    """``transformers.Trainer``, which keeps the optimiser's state of models that are cut over processes as well."""

    args: DPOConfig
    model: PreTrainedModel | PeftModel  # Trainer says that it may be None

    def __init__(self, *, model: PreTrainedModel | PeftModel, args: DPOConfig, **kwargs: Any) -> None:
        only_model = args.save_only_model
        args.save_only_model = only_model or is_load_sharded(model)  # or Trainer refuses to save at all
        try:
            super().__init__(model=model, args=args, **kwargs)
        finally:
            args.save_only_model = only_model

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_load_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        reshard(self.model)
        save_parts(self.model, self._bare_optimizer, Path(output_dir) / _OPTIMIZER)
        if self.args.should_save:
            assert self.lr_scheduler is not None
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / _SCHEDULE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not is_load_sharded(self.model):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_parts(self.model, self._bare_optimizer, Path(checkpoint) / _OPTIMIZER)
        assert self.lr_scheduler is not None
        schedule = torch.load(Path(checkpoint) / _SCHEDULE, weights_only=True)
        self.lr_scheduler.load_state_dict(schedule_for(schedule, len(self._bare_optimizer.param_groups)))

    @property
    def _bare_optimizer(self) -> torch.optim.Optimizer:
        wrapped: Any = self.optimizer  # accelerate's
        optimizer: torch.optim.Optimizer = wrapped.optimizer
        return optimizer
