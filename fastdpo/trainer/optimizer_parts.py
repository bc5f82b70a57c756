"""The optimiser's state of a model that is cut over processes: each writes its parts, and none has to hold all of it.

By the names of parameters, and as safetensors, so that nothing is unpickled when it is read; and it may be read where
devices share something else than they did. What all processes have alike one of them writes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

# What all processes have alike: the groups' settings, the counts of steps, the state of parameters that are whole.
_ALIKE = "alike.pt"
# state.NAME.KIND and param_groups.NAME.SETTING
_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def save_parts(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Write the optimiser's state to ``folder``, which all processes can write to; they call this together.

    Raises:
        NotImplementedError: it is of parts, and does not say of which.
    """
    state = _state_of(model, optimizer)
    parts = {name: _in_one_piece(value) for name, value in state.items() if isinstance(value, DTensor)}
    alike = {name: value for name, value in state.items() if name not in parts}
    _refuse_unknown_parts(model, optimizer, alike)
    folder.mkdir(exist_ok=True)
    save(parts, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    if dist.get_rank() == 0:
        torch.save(alike, folder / _ALIKE)


def load_parts(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Take the state that :func:`save_parts` wrote; all processes call this together."""
    state = _state_of(model, optimizer)
    alike = torch.load(folder / _ALIKE, map_location="cpu", weights_only=True)
    parts = {name: _in_one_piece(value) for name, value in state.items() if name not in alike}
    load(parts, storage_reader=HuggingFaceStorageReader(str(folder)))
    found = {name: _like(state[name], value) for name, value in (alike | parts).items()}
    with _without_empty_groups(optimizer):
        set_optimizer_state_dict(model, optimizer, found, options=_FLAT)


def schedule_for(schedule: dict[str, Any], groups: int) -> dict[str, Any]:
    """A schedule's state for so many groups of parameters, where it was that of more or fewer.

    Trainer makes a group of the parameters that the same devices share: where they share something else, these are
    others, and what the schedule keeps of each of them is the same.
    """
    if len(schedule.get("base_lrs", ())) == groups:
        return schedule
    found = {}
    for name, value in schedule.items():
        is_of_groups = isinstance(value, list) and value and all(entry == value[0] for entry in value)
        found[name] = value[:1] * groups if is_of_groups else value
    return found


def _state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    with _without_empty_groups(optimizer):
        return cast(dict[str, Any], get_optimizer_state_dict(model, optimizer, options=_FLAT))


@contextlib.contextmanager
def _without_empty_groups(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Where all that is trained has weight decay, or none of it, a group of Trainer's is empty: torch stops there."""
    empty = {i: group for i, group in enumerate(optimizer.param_groups) if not group["params"]}
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    try:
        yield
    finally:
        for i, group in empty.items():  # rising
            optimizer.param_groups.insert(i, group)


def _in_one_piece(value: Tensor) -> Tensor:
    """The same, of which a process has one piece: FSDP over tensor parallelism leaves it several of some tensors."""
    if not isinstance(value, DTensor):
        return value
    placements = [Shard(p.dim) if isinstance(p, _StridedShard) else p for p in value.placements]
    return value if placements == list(value.placements) else value.redistribute(placements=placements)


def _like(before: Any, value: Any) -> Any:
    """``value`` where the optimiser has ``before``: it may have been whole and be in parts now, or the reverse."""
    if not isinstance(before, DTensor):
        return value
    if isinstance(value, DTensor):
        return value.redistribute(placements=before.placements)
    return distribute_tensor(value.to(before.device), before.device_mesh, before.placements)


def _refuse_unknown_parts(model: nn.Module, optimizer: torch.optim.Optimizer, alike: dict[str, Any]) -> None:
    """Raises where a tensor that belongs to a parameter in parts passes for one that all processes have alike."""
    cut = {name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)}
    for name, value in alike.items():
        of_parameter = name.removeprefix("state.").rpartition(".")[0]
        if name.startswith("state.") and of_parameter in cut and isinstance(value, Tensor) and value.dim():
            raise NotImplementedError(
                f"the state that {type(optimizer).__name__} keeps of {of_parameter}, a weight that is cut over "
                "processes, cannot be saved: it does not say which part it is of. Use another optim, or save the "
                "model alone (save_only_model)"
            )
