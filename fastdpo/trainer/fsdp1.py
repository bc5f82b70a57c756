"""What FSDP in its first version, as accelerate sets it up, needs beside what ``Trainer`` does for its model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from peft import PeftModel
from peft.utils.other import fsdp_auto_wrap_policy
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

# What accelerate makes of a plugin's settings for one model, and another one's layers or tied weights do not fit.
_OF_ONE_MODEL = ("auto_wrap_policy", "transformer_cls_names_to_wrap", "param_init_fn")


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


def refuse_loading(accelerator: Accelerator, model: Any) -> None:
    """Raises where what a checkpoint holds would not all come back: a run would go on from elsewhere, and not say so.

    Raises:
        NotImplementedError: FSDP is in its first version, and trains an adapter, or writes every process's shards.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)  # there with FSDP alone
    if plugin is None or accelerator.is_fsdp2:
        return
    is_adapter = isinstance(accelerator.unwrap_model(model), PeftModel)
    if is_adapter or plugin.state_dict_type != StateDictType.FULL_STATE_DICT:
        what = "an adapter" if is_adapter else f"state_dict_type {plugin.state_dict_type.name}"
        raise NotImplementedError(
            f"checkpoints of FSDP's first version with {what} are not loaded (resume_from_checkpoint, "
            "load_best_model_at_end): not all that they hold would come back. Use FSDP2 (fsdp_version: 2 in "
            "accelerate's configuration), or, for a whole model, fsdp_state_dict_type: FULL_STATE_DICT"
        )


@contextlib.contextmanager
def plain_names(model: Any) -> Iterator[None]:
    """Modules of a sharded model with an adapter have the names that they have without FSDP, until the block ends.

    PEFT finds an adapter's weights by these, and would save and load none, and not say so.
    """
    if not isinstance(model, FullyShardedDataParallel) or not isinstance(model.module, PeftModel):
        yield
        return
    both: list[Any] = [model, model.module]
    for each in both:
        each.named_modules = _plain(each.named_modules)
    try:
        yield
    finally:
        for each in both:
            del each.named_modules


def _plain(named_modules: Any) -> Any:
    def named(*args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Module]]:
        for name, module in named_modules(*args, **kwargs):
            yield ".".join(part for part in name.split(".") if part != "_fsdp_wrapped_module"), module

    return named
