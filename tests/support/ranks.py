"""Runs a function on several gloo ranks and brings back what each returned; and what ``accelerate launch`` sets."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import DistributedType, PartialState
from processes import spawn
from torch.distributed.fsdp._flat_param import FlatParamHandle


@contextmanager
def launched(**settings: str) -> Iterator[None]:
    """As on a rank of ``accelerate launch --use_fsdp --fsdp_version 2``.

    accelerate shards nothing among processes on the CPU: these pass for processes on GPUs, in the one place that asks.
    """
    environment = {
        "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_TORCH_DEVICE": "cpu",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }
    with (
        mock.patch.dict(os.environ, environment | settings),
        mock.patch.object(PartialState, "_prepare_backend", lambda *_: ("gloo", DistributedType.MULTI_GPU)),
        # FSDP1 moves whole weights from a GPU and frees what they were there: which here is where they are.
        mock.patch.object(FlatParamHandle, "to_cpu", lambda _: nullcontext()),
    ):
        yield


def on_ranks(work: Callable[[], Any], world_size: int, folder: Path, *, anew: bool = False) -> list[Any]:
    """Each rank's result of ``work``, a function of some module; processes of one thread, in the default group.

    ``anew``: in processes that load the libraries themselves, by the environment that is there now.
    """
    start = torch.multiprocessing.spawn if anew else spawn
    start(_on_rank, (work, world_size, str(folder)), nprocs=world_size)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(world_size)]


def _on_rank(rank: int, work: Callable[[], Any], world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    torch.save(work(), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()
