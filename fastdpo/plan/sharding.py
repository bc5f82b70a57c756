"""What of a run's memory a device still holds where several share it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from fastdpo.model.language_model import language_model
from fastdpo.plan.models import look_at_policy
from fastdpo.plan.optimizers import state_bytes
from fastdpo.plan.setup import Setup

# How devices share a run: every one has all of it (DDP), or the optimiser's state is divided (ZeRO-1), or gradients as
# well (ZeRO-2), or weights as well (ZeRO-3, FSDP2).
STAGES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")

_DIVIDED = {
    "ddp": (),
    "zero1": ("optimizer",),
    "zero2": ("optimizer", "gradients"),
    "zero3": ("optimizer", "gradients", "weights", "reference"),
    "fsdp2": ("optimizer", "gradients", "weights", "reference"),
}
# Numbers of gathered weights that ZeRO-3 keeps until it lets go of some (stage3_max_live_parameters, by default).
_LIVE = 10**9


@dataclass(frozen=True)
class Units:
    """Of a model that is divided over devices, what is together at a time; bytes, but for ``trained_numbers``.

    Attributes:
        whole: of the policy, in what layers compute in.
        trained: of what is trained, and of its gradient.
        layer: of the largest layer that is gathered as one.
        rest: of what is in no such layer: embeddings, and the head.
        shards: of the policy, as FSDP2 keeps it between uses, on all devices together.
        trained_numbers: how many numbers are trained.
        state: of the optimiser's state, in float32.
        bucket: of gradients that are reduced as one by DeepSpeed.
    """

    whole: int
    trained: int
    layer: int
    rest: int
    shards: int
    trained_numbers: int
    state: int
    bucket: int


def is_divided(setup: Setup, stage: str) -> bool:
    """Whether devices can share the setup so.

    FSDP2 leaves weights in 4 bits whole on every device (accelerate does, unless they are stored as numbers of another
    type), and neither those nor weights in 8 bits have been tried with ZeRO-3 here.
    """
    return not (setup.bits and "weights" in _DIVIDED[stage])


def as_computed(setup: Setup, stage: str) -> Setup:
    """The setup as layers see it: DeepSpeed and FSDP2 hand them weights in 16 bits, which with DDP autocast makes."""
    if stage == "ddp" or setup.autocast is None:
        return setup
    return replace(setup, dtype=setup.autocast, autocast=None)


def units_of(setup: Setup, stage: str = "ddp") -> Units:
    """Of the setup's policy; a layer is what transformers says is not to be split."""
    policy = look_at_policy(setup)
    lm = language_model(policy)
    is_mixed = as_computed(setup, stage) is not setup
    dtype = setup.autocast if is_mixed and setup.autocast is not None else setup.dtype

    def size_of(parameters: Iterable[nn.Parameter]) -> int:
        return sum(p.numel() * (dtype if is_mixed and p.is_floating_point() else p.dtype).itemsize for p in parameters)

    kinds = set(lm._no_split_modules or ())
    sizes = [size_of(module.parameters()) for module in lm.modules() if type(module).__name__ in kinds]
    trained = [p for p in policy.parameters() if p.requires_grad]
    whole, numbers = size_of(policy.parameters()), sum(p.numel() for p in trained)
    shards = whole
    if is_mixed:  # what is trained is kept in float32
        shards = sum(p.numel() * (torch.float32 if p.requires_grad else p.dtype).itemsize for p in policy.parameters())
    return Units(
        whole=whole,
        trained=size_of(trained),
        layer=max(sizes, default=0),
        rest=max(0, whole - sum(sizes)),
        shards=shards,
        trained_numbers=numbers,
        state=state_bytes(setup.optim, [(p.shape, torch.float32) for p in trained]),
        bucket=lm.config.get_text_config().hidden_size ** 2 * dtype.itemsize,
    )


def share_of(parts: Mapping[str, int], stage: str, devices: int, units: Units) -> dict[str, int]:
    """What each of ``devices`` holds of what one would hold by itself, with layers as :func:`as_computed` has them.

    Activations and the head's part are of each device's own micro-batch. Gathered layers, and DDP's buckets (a copy of
    all gradients), are workspace. DeepSpeed keeps the trained weights in float32 beside those that layers see, with the
    optimiser's state, and in its step their gradients as well (Rajbhandari et al. 2020, arXiv 1910.02054, section 3.1).

    Raises:
        ValueError: there is no such stage, or no device.
    """
    if stage not in STAGES:
        raise ValueError(f"stage is {stage!r}; it should be one of {', '.join(STAGES)}")
    if devices < 1:
        raise ValueError(f"devices is {devices}; it should be at least 1")
    if devices == 1:
        return dict(parts)
    found = dict(parts)
    if stage == "ddp":
        found["workspace"] += units.trained
    elif stage == "fsdp2":
        found["weights"] = units.shards + parts["weights"] - units.whole
        found["reference"] = parts["reference"] * units.shards // max(units.whole, 1)
        found["gradients"] = parts["gradients"] * 4 * units.trained_numbers // max(units.trained, 1)
        found["optimizer"] = units.state
        # The layer that is computed, the next one on its way, and the root, which stays; their gradients likewise.
        found["workspace"] += 2 * units.layer + units.rest + min(units.trained, units.layer + units.rest)
    else:
        found["optimizer"] = units.state + 4 * units.trained_numbers
        found["workspace"] += 2 * units.bucket
    if stage == "zero3":
        itemsize = units.trained // max(units.trained_numbers, 1)
        live = max(2 * units.layer + units.rest, _LIVE * itemsize)
        found["workspace"] += min(units.whole, live) + min(units.trained, units.layer + units.rest)
    found = {name: -(-size // devices) if name in _DIVIDED[stage] else size for name, size in found.items()}
    return max(found, _in_step(found, stage, devices, units), key=lambda held: sum(held.values()))


def _in_step(found: Mapping[str, int], stage: str, devices: int, units: Units) -> dict[str, int]:
    """The same while DeepSpeed's optimiser steps."""
    if not stage.startswith("zero"):
        return dict(found)
    divided = devices if "gradients" in _DIVIDED[stage] else 1
    return dict(found) | {
        "gradients": -(-units.trained // divided),
        "activations": 0,
        "head": 0,
        "workspace": -(-4 * units.trained_numbers // devices),
    }
