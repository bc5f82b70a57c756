"""Models of which two gloo ranks have loaded a part each, by transformers' own plans; what the ranks then see."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tiny_families import make_family
from tiny_models import FAMILIES, make_model
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

FOLDER = "SPREAD_MODELS_FOLDER"  # where they are, in the environment


def spread_and_whole(family: str, **sizes: int) -> tuple[Any, Any]:
    """This rank's part of a small random model, and all of it; by all ranks together."""
    folder = Path(os.environ[FOLDER]) / family
    if dist.get_rank() == 0 and not folder.exists():
        made = make_model(family) if family in FAMILIES else make_family(family, trained=True)
        made.save_pretrained(folder)
    dist.barrier()
    load = AutoModelForCausalLM.from_pretrained
    part = load(folder, dtype="float32", distributed_config=DistributedConfig(**sizes))
    return part.eval(), load(folder, dtype="float32").eval()


def token_batch(number: int) -> Tensor:
    return (torch.arange(2 * 17) * 7919 + 31 * number).remainder(90).view(2, 17) + 3


def backward(model: Any, ids: Tensor) -> None:
    """Of a mean over rows that stand alone: of the same weight on every rank."""
    logps = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])
    (logps.squeeze(2) * torch.linspace(0.5, 1.5, 16)).mean().backward()


def gradient_error(part: Any, whole: Any) -> dict[str, float]:
    """By which share of its largest entry each parameter's gradient is off, on this rank where it is whole on each."""
    found = {}
    for name, parameter in whole.named_parameters():
        gradient = part.get_parameter(name).grad
        gradient = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        found[name] = float((gradient - parameter.grad).abs().max() / parameter.grad.abs().max())
    return found
