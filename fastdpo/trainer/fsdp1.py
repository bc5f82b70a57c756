"""What FSDP in its first version, as accelerate sets it up, needs beside what ``Trainer`` does for its model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from peft.utils.other import fsdp_auto_wrap_policy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

# What accelerate makes of a plugin's settings for one model, and another one's layers or tied weights do not fit.
_OF_ONE_MODEL = ("auto_wrap_policy", "transformer_cls_names_to_wrap", "param_init_fn")

# Parts of names that belong to what is put around modules.
_WRAPPERS = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def wrap_without_optimizer(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """``model``, which no optimiser has yet, sharded as ``Trainer`` shards the one that it trains.

    Accelerate does not take note of it. To be called by all processes.
    """
    plugin, known = accelerator.state.fsdp_plugin, len(accelerator._models)
    before = {name: getattr(plugin, name) for name in _OF_ONE_MODEL}
    try:
        if isinstance(model, PeftModel):
            plugin.auto_wrap_policy = fsdp_auto_wrap_policy(model)  # what is trained is apart from what is not
        wrapped: nn.Module = accelerator.prepare_model(model)
    finally:
        del accelerator._models[known:]
        for name, value in before.items():
            setattr(plugin, name, value)
    return wrapped


def each_unit(model: FullyShardedDataParallel, work: Callable[[dict[str, Tensor]], None], *, writes: bool) -> None:
    """Does some work on what each unit of FSDP holds itself, whole in every process; a unit at a time is gathered.

    To be called by all processes.

    Args:
        model: sharded.
        work: gets name -> parameter or persistent buffer, by the names that the model has without FSDP.
        writes: what ``work`` changes of parameters stays.
    """
    with FullyShardedDataParallel.summon_full_params(model, recurse=False, writeback=False):
        pass  # the outermost unit has to be the first that is used, to know that it is
    for prefix, unit in model.named_modules():
        if isinstance(unit, FullyShardedDataParallel):
            with torch.no_grad(), FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=writes):
                work({_plain(name): tensor for name, tensor in _own_tensors(unit, prefix)})


def _own_tensors(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Of a unit of FSDP, without those of the units in it."""
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        if name not in module._non_persistent_buffers_set:
            yield f"{prefix}.{name}", tensor
    for name, child in module.named_children():
        if not isinstance(child, FullyShardedDataParallel):
            yield from _own_tensors(child, f"{prefix}.{name}")


def has_adapter(model: Any) -> bool:
    """Whether ``model`` is sharded, and has an adapter."""
    return isinstance(model, FullyShardedDataParallel) and isinstance(model.module, PeftModel)


@contextlib.contextmanager
def plain_names(model: Any) -> Iterator[None]:
    """Modules of a sharded model with an adapter have the names that they have without FSDP, until the block ends.

    PEFT finds an adapter's weights by these, and would save and load none, and not say so.
    """
    if not has_adapter(model):
        yield
        return
    both: list[Any] = [model, model.module]
    for each in both:
        each.named_modules = _with_plain_names(each.named_modules)
    try:
        yield
    finally:
        for each in both:
            del each.named_modules


def _with_plain_names(named_modules: Any) -> Any:
    def named(*args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        return ((_plain(name), module) for name, module in named_modules(*args, **kwargs))

    return named


def _plain(name: str) -> str:
    """The name that a module or tensor has without FSDP, and without its activation checkpointing."""
    return ".".join(part for part in name.split(".") if part and part not in _WRAPPERS)
