"""Processes that must run the model equally often, though their batches are taken in different numbers of parts."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator, DistributedType

from fastdpo.model.scoring import micro_batches


def runs_in_step(accelerator: Accelerator) -> bool:
    """Whether the processes meet in every forward or backward, and not only in the last one before a step."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def idle_parts(accelerator: Accelerator, batch: dict[str, Any], max_tokens: int | None) -> list[dict[str, Any]]:
    """What this process runs beside the parts of its batch, to run as many as the one that has the most.

    They are copies of its own last part, and are to count nothing. Empty where processes need not meet, or no batch is
    taken in parts (``max_tokens`` is None). To be called by all processes together, before any runs its own.
    """
    if max_tokens is None or accelerator.num_processes == 1 or not runs_in_step(accelerator):
        return []
    parts = micro_batches(batch)
    count = torch.tensor([len(parts)], device=accelerator.device)
    most = int(accelerator.gather(count).max())
    return [parts[-1]] * (most - len(parts))
