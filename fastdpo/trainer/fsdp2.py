"""What FSDP2, as accelerate sets it up, needs beside what ``Trainer`` does for the model that it trains."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import fsdp2_prepare_model
from torch import nn
from torch.distributed.fsdp import FSDPModule, StateDictType


def keep_output_dtypes(accelerator: Accelerator) -> None:
    """Have modules return what they computed; to be called before any model is sharded.

    Under mixed precision accelerate casts every module's output to 16 bits, and so would log-probabilities be, which
    the head gives in float32. Weights, inputs and gradients are cast as before.
    """
    plugin = accelerator.state.fsdp_plugin
    policy = plugin.mixed_precision_policy
    if policy is not None and policy.output_dtype in (torch.bfloat16, torch.float16):
        plugin.mixed_precision_policy = dataclasses.replace(policy, output_dtype=None)


def shard_without_optimizer(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """``model``, which no optimiser has yet, sharded in place as ``Trainer`` shards the one that it trains.

    accelerate's own ``prepare`` takes a model with its optimiser only, and one of them. To be called by all processes.
    """
    sharded: nn.Module = fsdp2_prepare_model(accelerator, model)
    return sharded


def reshard(model: nn.Module) -> None:
    """Lets go of what a forward without a backward has gathered and kept: the last layers' weights, and the root's.

    An optimiser that is made while these stand in the model would move them, and not the shards.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextlib.contextmanager
def keep_requires_grad(model: nn.Module) -> Iterator[None]:
    """Parameters require a gradient after the block where they did before it.

    PEFT turns that off and on with its adapters, on the parameters that it finds: with FSDP2 these may be the shards
    before a forward and the gathered parameters after it, and shards that stayed off are left out of checkpoints.
    """
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def whole_weights(accelerator: Accelerator) -> Iterator[None]:
    """``Trainer.save_model`` brings the weights together in the main process, until the block ends.

    It does so by itself where checkpoints hold whole weights (FULL_STATE_DICT), and where they hold every process's
    shards, which is accelerate's default, it saves nothing.
    """
    plugin = accelerator.state.fsdp_plugin
    kind = plugin.state_dict_type
    plugin.state_dict_type = StateDictType.FULL_STATE_DICT
    try:
        yield
    finally:
        plugin.state_dict_type = kind
