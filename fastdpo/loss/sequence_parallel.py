"""Sums over ranks that each hold a part of every sequence (sequence, or context, parallelism)."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastdpo.logps.wide import wide_dtype


def sum_over_group(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the ranks of ``group``, the same on every rank; differentiable.

    Meant for sequence sums: where each rank has some of a sequence's tokens, its log-probability is the sum of what
    the ranks have, 2B numbers for a batch of B pairs. Every rank then computes the whole loss from the sums, and calls
    backward: dL/dsum is the same everywhere, and is what each rank's own part gets, with no further exchange.

    (``torch.distributed.nn.all_reduce`` sums the gradients as well, which is right where each rank's loss is but a part
    of the whole one.)

    Args:
        values: of any shape, the same on every rank; a floating dtype, or int64 (numbers of tokens).
        group: on the ranks of which this is called, in the same order of calls.

    Returns:
        float64, for log-probabilities' sums lose precision in float32; int64 for int64, without a gradient.

    Raises:
        TypeError: values has another dtype, or group is no process group.
    """
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group is a {type(group).__name__}; it should be a torch.distributed.ProcessGroup")
    if not values.is_floating_point() and values.dtype != torch.int64:
        raise TypeError(f"values has dtype {values.dtype}; it should be a floating dtype or torch.int64")
    total: Tensor = _SumOverGroup.apply(values, group)  # type: ignore[no-untyped-call]
    return total


class _SumOverGroup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.dtype = values.dtype
        wide = torch.promote_types(values.dtype, wide_dtype(values.device))
        total = values.to(wide if values.is_floating_point() else torch.int64, copy=True).contiguous()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None
