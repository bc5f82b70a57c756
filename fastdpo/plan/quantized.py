"""Layers that hold what bitsandbytes' hold, and compute in as much memory, for models that have no numbers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# Numbers that share a scale, and scales that share one where these are quantised as well.
_BLOCK, _NESTED_BLOCK = 64, 256


class QuantizedLinear(nn.Linear):
    """As ``bitsandbytes.nn.Linear4bit`` or ``Linear8bitLt``: a frozen weight in fewer bits, widened for each product.

    Args:
        layer: whose place it takes.
        bits: 4 or 8.
        compute: what products are computed in.
        nested: scales are quantised as well.
    """

    def __init__(self, layer: nn.Linear | Conv1D, bits: int, compute: torch.dtype, nested: bool) -> None:
        nn.Module.__init__(self)
        shape = layer.weight.shape if isinstance(layer, Conv1D) else layer.weight.shape[::-1]
        self.in_features, self.out_features = shape
        self.compute = compute
        numbers = layer.weight.numel()
        packed = layer.weight.new_empty((numbers * bits // 8, 1), dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.bias = layer.bias
        size = 4 * self.out_features if bits == 8 else scale_bytes(numbers, nested)
        self.register_buffer("scales", layer.weight.new_empty(size, dtype=torch.uint8))

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = _WidenedProduct.apply(input.to(self.compute), self)  # type: ignore[no-untyped-call]
        return (result if self.bias is None else result + self.bias.to(result.dtype)).to(input.dtype)


def scale_bytes(numbers: int, nested: bool) -> int:
    """What the scales of so many numbers in 4 bits take up."""
    blocks = -(-numbers // _BLOCK)
    return blocks + 4 * -(-blocks // _NESTED_BLOCK) if nested else 4 * blocks


class _WidenedProduct(torch.autograd.Function):
    """x W^T, with W widened anew in the backward; x is not kept, for W has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, _widened(x, layer))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ _widened(grad, ctx.layer), None


def _widened(like: Tensor, layer: QuantizedLinear) -> Tensor:
    return like.new_empty((layer.out_features, layer.in_features))


def quantize(lm: PreTrainedModel, bits: int, compute: torch.dtype, *, nested: bool = False) -> None:
    """Every linear layer but the output embedding in 4 or 8 bits, and all of the model frozen, as QLoRA has it."""
    head = lm.get_output_embeddings()
    for parent in list(lm.modules()):
        for name, layer in list(parent.named_children()):
            if (type(layer) is nn.Linear or isinstance(layer, Conv1D)) and layer is not head:
                setattr(parent, name, QuantizedLinear(layer, bits, compute, nested))
    lm.requires_grad_(False)
