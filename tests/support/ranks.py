"""Runs a function on several gloo ranks and brings back what each returned."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def on_ranks(work: Callable[[], Any], world_size: int, folder: Path) -> list[Any]:
    """Each rank's result of ``work``, a function of some module; processes of one thread, in the default group."""
    torch.multiprocessing.spawn(_on_rank, (work, world_size, str(folder)), nprocs=world_size)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world_size)]


def _on_rank(rank: int, work: Callable[[], Any], world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.save(work(), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()
