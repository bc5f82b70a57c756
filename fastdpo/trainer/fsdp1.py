"""What FSDP in its first version, as accelerate sets it up, needs beside what ``Trainer`` does for its model."""

from __future__ import annotations

from accelerate import Accelerator
from peft import PeftModel
from peft.utils.other import fsdp_auto_wrap_policy
from torch import nn

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
