"""The weights of two models that are held alike, one after another, wherever processes have divided them.

FSDP2 gives each process a part of every weight, and parts of weights that are cut alike can be worked on as they are.
FSDP1 and ZeRO-3 put several weights, or whole ones, into one array: they are brought together, a few at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FlatParameter, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor

from fastdpo.trainer import fsdp2
from fastdpo.trainer.zero import gathered, is_partitioned

# What wrappers put into the names of weights.
_OF_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")


def plain_name(name: str) -> str:
    """A weight's name without those of what is around its module."""
    for part in _OF_WRAPPERS:
        name = name.replace(part, "")
    return name


def whole_shape(parameter: Tensor) -> torch.Size:
    """Of all of a weight, also where ZeRO-3 has divided it."""
    return torch.Size(cast(Any, parameter).ds_shape) if is_partitioned(parameter) else parameter.shape


def parts_of_both(theirs: nn.Module, ours: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, weight of ``theirs``, and the one of ``ours``, or what this process has of both, cut alike.

    What is done to the former in place, before the next are asked for, stays. To be called by all processes, which do
    the same to each.
    """
    if isinstance(theirs, FullyShardedDataParallel):
        for (name, unit), (_, its) in zip(_units(theirs), _units(ours), strict=True):
            with _summoned(its, keeps=False), _summoned(unit, keeps=True):
                own = dict(_own(its))
                yield from ((f"{name}{key}", weight, own[key]) for key, weight in _own(unit))
        return
    _let_go_of_gathered(theirs, ours)
    others = {plain_name(name): parameter for name, parameter in ours.named_parameters()}
    for name, mine in theirs.named_parameters():
        other = others[plain_name(name)]
        if is_partitioned(mine):
            with gathered([other]), gathered([mine], keeps=True):
                yield plain_name(name), mine, other
        elif isinstance(mine, DTensor):
            assert isinstance(other, DTensor) and mine.placements == other.placements
            yield plain_name(name), mine.to_local(), other.to_local()
        else:
            yield plain_name(name), mine, other


def whole_weights_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and weight, whole, one after another. To be called by all processes."""
    if isinstance(model, FullyShardedDataParallel):
        for name, unit in _units(model):
            with _summoned(unit, keeps=False):
                yield from ((f"{name}{key}", weight) for key, weight in _own(unit))
        return
    _let_go_of_gathered(model)
    for name, parameter in model.named_parameters():
        with gathered([parameter]):
            whole: Tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            yield plain_name(name), whole


@torch.no_grad()
def put_back(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Has a model's weights be these, by their names; others stay. To be called by all processes, with the same."""
    if isinstance(model, FullyShardedDataParallel):
        for name, unit in _units(model):
            with _summoned(unit, keeps=True):
                for key, weight in _own(unit):
                    if f"{name}{key}" in weights:
                        weight.copy_(weights[f"{name}{key}"])
        return
    _let_go_of_gathered(model)
    for name, parameter in model.named_parameters():
        whole = weights.get(plain_name(name))
        if whole is None:
            continue
        if isinstance(parameter, DTensor):
            whole = whole.to(parameter.device)
            parameter.copy_(distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None))
            continue
        with gathered([parameter], keeps=True):
            parameter.copy_(whole)


def _let_go_of_gathered(*models: nn.Module) -> None:
    """What forwards have left gathered is not what is kept, and would not be what is worked on."""
    for model in models:
        fsdp2.reshard(model)


# ------------------------------------------------------------------------------------------------------------- FSDP1


def _units(root: nn.Module) -> Iterator[tuple[str, FullyShardedDataParallel]]:
    """The modules that hold weights together, and what stands before their weights' names."""
    for name, module in root.named_modules():
        if isinstance(module, FullyShardedDataParallel):
            plain = plain_name(f"{name}.")
            yield plain.removeprefix("."), module


@contextlib.contextmanager
def _summoned(unit: FullyShardedDataParallel, *, keeps: bool) -> Iterator[None]:
    with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=keeps):
        yield


def _own(unit: FullyShardedDataParallel) -> Iterator[tuple[str, Tensor]]:
    """The weights that a unit itself holds, and not one within it."""
    within = [module for module in unit.modules() if isinstance(module, FullyShardedDataParallel)][1:]
    theirs = {id(parameter) for module in within for parameter in module.parameters()}
    for name, parameter in unit.module.named_parameters():
        if id(parameter) not in theirs and not isinstance(parameter, FlatParameter):
            yield plain_name(name), parameter
