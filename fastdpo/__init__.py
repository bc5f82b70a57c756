"""fastdpo: Direct Preference Optimisation from hidden states, with no logits in memory."""

from __future__ import annotations

from importlib.metadata import version as _version
from typing import Any

from fastdpo._native import build_info
from fastdpo.distributed import sum_over_group
from fastdpo.logps import token_logps
from fastdpo.loss import DPOLoss, dpo_loss, preference_loss
from fastdpo.loss_options import LossOptions
from fastdpo.low_rank import LowRankUpdate
from fastdpo.outputs import DPOOutput, TokenLogps

__version__ = _version("fastdpo")

__all__ = [
    "DPOConfig",
    "DPOLoss",
    "DPOOutput",
    "DPOTrainer",
    "LossOptions",
    "LowRankUpdate",
    "TokenLogps",
    "build_info",
    "dpo_loss",
    "preference_loss",
    "sum_over_group",
    "token_logps",
]


def __getattr__(name: str) -> Any:
    # The trainer brings transformers with it; whoever needs the loss alone does not wait for that.
    if name in ("DPOConfig", "DPOTrainer"):
        from fastdpo import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module 'fastdpo' has no attribute {name!r}")
