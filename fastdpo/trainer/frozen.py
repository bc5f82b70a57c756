"""A model that no optimiser has, held as the processes of a run hold the one that they train."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator, DistributedType
from torch import nn

from fastdpo.trainer import fsdp1, fsdp2, zero
from fastdpo.trainer.lockstep import runs_in_step


def is_divided_later(accelerator: Accelerator) -> bool:
    """Whether FSDP or DeepSpeed takes hold of the policy when the training begins, and not before."""
    return runs_in_step(accelerator)  # the same engines


def meets_in_forwards(accelerator: Accelerator) -> bool:
    """Whether the processes bring a layer's weights together when it runs, and so have to run it equally often."""
    return accelerator.distributed_type == DistributedType.FSDP or zero.zero_stage(accelerator) == 3


def hold_frozen(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """What is called in the place of ``model``, which is held as the policy is in training.

    That is: on the device; with FSDP and ZeRO-3 divided among the processes; with DeepSpeed in its precision. To be
    called by all processes.
    """
    if accelerator.is_fsdp2:
        return fsdp2.shard_without_optimizer(accelerator, model)
    if accelerator.distributed_type == DistributedType.FSDP:
        return fsdp1.wrap_without_optimizer(accelerator, model)
    if zero.zero_stage(accelerator) is not None:
        return zero.inference_engine(accelerator, model)
    known = len(accelerator._models)
    prepared: nn.Module = accelerator.prepare_model(model, evaluation_mode=True)
    # Evaluation before training asks accelerate whether it prepared a model, and means the policy. What it notes is
    # not what it returns, where it compiles.
    del accelerator._models[known:]
    return prepared


def let_go(accelerator: Accelerator, held: Any) -> None:
    """Ends what :func:`hold_frozen` began, so that another model, or the same, can be held."""
    if zero.zero_stage(accelerator) is not None:
        zero.let_go(held)
