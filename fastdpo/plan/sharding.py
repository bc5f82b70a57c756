"""What of a run's memory a device still holds where several share it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from fastdpo.model.language_model import language_model
from fastdpo.plan.models import make_policy
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


@dataclass(frozen=True)
class Units:
    """Of a model that is divided over devices, what is together at a time.

    Attributes:
        whole: bytes of the policy.
        trained: bytes of what is trained.
        layer: bytes of the largest layer that is gathered as one.
        rest: bytes of what is in no such layer: embeddings, and the head.
    """

    whole: int
    trained: int
    layer: int
    rest: int


def units_of(setup: Setup) -> Units:
    """Of the setup's policy; a layer is what transformers says is not to be split."""
    policy = make_policy(setup)
    lm = language_model(policy)
    kinds = set(lm._no_split_modules or ())
    layers = [module for module in lm.modules() if type(module).__name__ in kinds]
    sizes = [_bytes(layer) for layer in layers]
    trained = sum(p.numel() * p.element_size() for p in policy.parameters() if p.requires_grad)
    whole = _bytes(policy)
    return Units(whole, trained, max(sizes, default=0), max(0, whole - sum(sizes)))


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def share_of(parts: Mapping[str, int], stage: str, devices: int, units: Units) -> dict[str, int]:
    """What each of ``devices`` holds of what one would hold by itself.

    Activations and the head's part are of each device's own micro-batch. Gathered layers, and DDP's buckets (a copy of
    all gradients), are workspace.

    Raises:
        ValueError: there is no such stage, or no device.
    """
    if stage not in STAGES:
        raise ValueError(f"stage is {stage!r}; it should be one of {', '.join(STAGES)}")
    if devices < 1:
        raise ValueError(f"devices is {devices}; it should be at least 1")
    if devices == 1:
        return dict(parts)
    found = {name: -(-size // devices) if name in _DIVIDED[stage] else size for name, size in parts.items()}
    if stage in ("ddp", "zero1"):
        found["workspace"] += units.trained
    elif stage in ("zero3", "fsdp2"):
        # The layer that is computed, the next one on its way, and the root, which stays; their gradients likewise.
        found["workspace"] += 2 * units.layer + units.rest + min(units.trained, units.layer + units.rest)
    return found
