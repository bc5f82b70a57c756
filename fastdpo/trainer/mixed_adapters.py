"""A mixture of LoRA adapters, as one of a higher rank: what TR-DPO's soft update makes of an adapter.

After k updates the reference's delta of a layer is the sum of alpha (1 - alpha)^(k - j) B_j A_j over the adapters that
the policy has had, which no adapter of the same rank is. Side by side, columns of B and rows of A, they are one of rank
k r; and of a term that (1 - alpha)^n has made smaller than float32's rounding of the sum, nothing is left to keep. So n
adapters have room, n being the smallest with (1 - alpha)^n <= 2^-24: 19 where alpha is 0.6.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

_BITS = 24  # of float32's significand
_ALWAYS_AFFORDABLE = 256  # a rank


@dataclass
class _Layer:
    """A LoRA layer of the reference and the policy's, by the name of the adapter."""

    name: str
    theirs: Any
    ours: Any
    adapter: str

    def factors(self, layer: Any) -> tuple[nn.Linear, nn.Linear]:
        return layer.lora_A[self.adapter], layer.lora_B[self.adapter]


class MixedAdapter:
    """The adapter of a reference, with room for what the policy's adapter will have been.

    Args:
        reference: a copy of the policy, whose LoRA layers get matrices of a higher rank here.
        policy: what is trained.
        alpha: how much of the policy's adapter an update takes in, above 0, below 1.

    Attributes:
        names: the reference's weights that this mixes.

    Raises:
        ValueError: the adapter is of another kind, or the mixture would take more than the weights themselves.
    """

    def __init__(self, reference: PeftModel, policy: PeftModel, alpha: float) -> None:
        self._alpha = alpha
        self._slots = math.ceil(-_BITS * math.log(2) / math.log1p(-alpha))
        self._shares = torch.zeros(self._slots, dtype=torch.float64)  # of each adapter, 0 where there is room
        self._shares[0] = 1.0
        self._layers = list(_layers_of(reference, policy))
        for layer in self._layers:
            self._widen(layer)
        self.names = {f"{layer.name}.lora_{side}.{layer.adapter}.weight" for layer in self._layers for side in "AB"}

    @torch.no_grad()
    def update(self) -> None:
        """Take the policy's adapter in, in the place of the one with the least share."""
        slot = int(self._shares.argmin())
        self._shares *= 1 - self._alpha
        self._shares[slot] = self._alpha
        for layer in self._layers:
            (a, b), (new_a, new_b) = layer.factors(layer.theirs), layer.factors(layer.ours)
            rank = len(new_a.weight)
            place = slice(slot * rank, (slot + 1) * rank)
            b.weight *= 1 - self._alpha
            a.weight[place] = new_a.weight
            b.weight[:, place] = self._alpha * new_b.weight

    @property
    def shares(self) -> Tensor:
        """[n] float64: of each adapter in the mixture, which a checkpoint has to hold beside the weights."""
        return self._shares.clone()

    def take_up(self, shares: Tensor) -> None:
        """Go on with a checkpoint's."""
        self._shares = shares.clone()

    def _widen(self, layer: _Layer) -> None:
        a, b = layer.factors(layer.theirs)
        rank, (inner, outer) = len(a.weight), (a.weight.shape[1], b.weight.shape[0])
        wide = self._slots * rank
        if wide > max(_ALWAYS_AFFORDABLE, inner * outer // (inner + outer)):
            raise ValueError(
                f"ref_model_mixup_alpha is {self._alpha:g}, of which the reference would be a mixture of "
                f"{self._slots} adapters, and take more than the weights of {layer.name} themselves ({outer} x "
                f"{inner}); give more, up to 1, which copies the adapter, a smaller rank, or train all weights"
            )
        wide_a, wide_b = a.weight.new_zeros(wide, inner), b.weight.new_zeros(outer, wide)
        wide_a[:rank], wide_b[:, :rank] = a.weight.detach(), b.weight.detach()
        a.weight, b.weight = (nn.Parameter(each, requires_grad=False) for each in (wide_a, wide_b))


def _layers_of(reference: PeftModel, policy: PeftModel) -> Iterator[_Layer]:
    ours = dict(policy.named_modules())
    for name, module in reference.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter in module.active_adapters:
            if adapter in module.lora_embedding_A:
                raise ValueError(_other_kind(name, "is of an embedding"))
            if adapter not in module.lora_A:
                continue
            parts = (module.lora_A[adapter], module.lora_B[adapter])
            if adapter in module.lora_variant or not all(isinstance(part, nn.Linear) for part in parts):
                raise ValueError(_other_kind(name, "is not plain LoRA on a linear layer"))
            yield _Layer(name, module, cast(Any, ours[name]), adapter)


def _other_kind(name: str, what: str) -> str:
    return (
        f"ref_model_mixup_alpha is below 1, and the adapter's {name} {what}: of these no mixture is one adapter. Give "
        "ref_model_mixup_alpha=1, which copies the adapter, or train all weights"
    )
