"""The trainers that are compared, and how they ask their reference beforehand."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

# The method by which each library asks the reference beforehand, to be timed.
CACHE_METHODS = {"trl": "_precompute_ref_logps", "fastdpo": "_precompute_reference"}


def trainer_classes(library: str) -> tuple[type[Trainer], type[Any]]:
    """DPOTrainer and DPOConfig; the other library is not imported."""
    if library == "trl":
        from trl import DPOConfig, DPOTrainer
    else:
        from fastdpo import DPOConfig, DPOTrainer
    return DPOTrainer, DPOConfig
