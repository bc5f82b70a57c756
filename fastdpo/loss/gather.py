"""Rows of a tensor, picked with repeats, whose gradients add up in a fixed order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdpo.logps.wide import segment_sums


def picked(values: Tensor, index: Tensor) -> Tensor:
    """``values[index]``, [n, ...] from [S, ...] and [n] int64.

    The gradient of a row is summed over the places that it was picked for, in their order, without atomics as
    ``index_select``'s is on a GPU: results repeat.
    """
    if not values.requires_grad:
        return values.index_select(0, index)
    result: Tensor = _Picked.apply(values, index)  # type: ignore[no-untyped-call]
    return result


class _Picked(torch.autograd.Function):
    @staticmethod
    def forward(values: Tensor, index: Tensor) -> Tensor:
        return values.index_select(0, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        values, index = inputs
        ctx.rows = len(values)
        ctx.save_for_backward(index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        in_rows, order = index.sort(stable=True)
        bounds = torch.searchsorted(in_rows, torch.arange(ctx.rows + 1, device=index.device))
        columns = grad.index_select(0, order).flatten(1).unbind(1) if grad.dim() > 1 else [grad.index_select(0, order)]
        sums = torch.stack([segment_sums(column.contiguous(), bounds) for column in columns], dim=1)
        return sums.view(ctx.rows, *grad.shape[1:]), None
