"""token_logps over ranks that each hold a part of the vocabulary (the arithmetic: vocab_shards.py).

Per call the ranks gather their numbers of entries, then a few float64 numbers a token; in the backward they sum
hidden's gradient. Which of these take place, and in which order, follows from what is the same on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastdpo.logps import vocab_shards
from fastdpo.logps.derivatives import first_derivative, refuse_forward_mode
from fastdpo.logps.graphs import outside_of_graphs
from fastdpo.logps.ops import OUTPUTS, OpInputs, backward_op, forward_op
from fastdpo.logps.scored import ScoredRows


@outside_of_graphs("token_logps(group=...) runs outside of compiled graphs")
def vocab_parallel_logps(
    inputs: OpInputs, group: dist.ProcessGroup, retain_bytes: int, outputs: Sequence[str]
) -> tuple[Tensor, ...]:
    """As ``differentiable_logps``; ``inputs`` have the rank's part of weight and bias, and the vocabulary's targets."""
    hidden, weight, targets, bias, scalars = inputs
    rank = _rank_in(group)
    ends = _gather(targets.new_full((1,), weight.shape[0]), group).flatten().cumsum(0)

    rows = ScoredRows.find(targets, scalars, ends[-1])
    # Rows that are not scored are left out here, and not by the ops, so that they need not be sent either.
    picked = rows.pick(hidden)
    shard = OpInputs(picked, weight, rows.pick(targets), bias, scalars | {"num_scored": len(picked)})
    grad = torch.is_grad_enabled()
    needs = [grad and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    names = tuple(name for name in OUTPUTS if name in outputs)
    logps, *extras = _ShardedLogps.apply(*shard, ends, ends[rank] - weight.shape[0], group, needs, retain_bytes, names)  # type: ignore[no-untyped-call]
    return rows.spread(logps, dict(zip(names, extras, strict=True)))


class _ShardedLogps(torch.autograd.Function):
    """Of rows that are all scored, whose targets are entries of the whole vocabulary."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        scalars: dict[str, Any],
        ends: Tensor,
        start: Tensor,
        group: dist.ProcessGroup,
        needs: Sequence[bool],
        retain_bytes: int,
        names: tuple[str, ...],
    ) -> tuple[Tensor, ...]:
        need_hidden, need_weight, need_bias = needs
        stand_in = vocab_shards.stand_in_entry(bias)
        local, owned = vocab_shards.local_targets(targets, start, weight.shape[0], stand_in)
        logps, row_state, direction, retained, *extras = forward_op(
            OpInputs(hidden, weight, local, bias, scalars),
            need_direction=need_hidden,
            retain_bytes=retain_bytes if need_weight or need_bias else 0,
            outputs=names,
        )
        rows = vocab_shards.shard_rows(logps, row_state, owned)
        of_name = dict(zip(OUTPUTS, extras, strict=True))
        stats = vocab_shards.shard_stats(rows, {name: of_name[name] for name in names})
        # What is no entry of the vocabulary is no rank's target (on CUDA, where nothing was raised): a row of NaN.
        stats[0].masked_fill_((targets < 0) | (targets >= ends[-1]), torch.nan)
        gathered = _gather(stats, group)

        owner = torch.searchsorted(ends, targets, right=True).clamp_(max=len(ends) - 1)
        whole, combined = vocab_shards.combine(gathered, owner, ends.diff(prepend=ends.new_zeros(1)), names)
        weights = vocab_shards.entry_weights(rows, whole, scalars)
        row_state = vocab_shards.op_row_state(rows, whole, weights, logps.dtype)
        vocab_shards.set_kept_targets(retained, local, row_state, scalars)
        share = direction
        if need_hidden:
            entries = weight.index_select(0, local)
            share = vocab_shards.share_of_direction(direction, rows, whole.lse, weights, entries)
        results = [whole.logp, *(combined[name] for name in names)]
        results = [value.to(logps.dtype) for value in results]

        ctx.needs, ctx.scalars, ctx.group = needs, scalars, group
        ctx.save_for_backward(hidden, weight, local, bias, row_state, share, retained)
        ctx.mark_non_differentiable(*results[1:])
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        compute = partial(_gradients, ctx.needs, ctx.scalars, ctx.group)
        grad_hidden, grad_weight, grad_bias = first_derivative(compute, grad_logps, *ctx.saved_tensors)
        return grad_hidden, grad_weight, None, grad_bias, *(None,) * 7

    jvp = staticmethod(refuse_forward_mode)


def _gradients(
    needs: Sequence[bool],
    scalars: dict[str, Any],
    group: dist.ProcessGroup,
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    local: Tensor,
    bias: Tensor | None,
    row_state: Tensor,
    share: Tensor,
    retained: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight and bias; None for what needs none."""
    need_hidden, need_weight, need_bias = needs
    grad_hidden = summed = None
    if need_hidden:
        grad_hidden = share * grad_logps.unsqueeze(1)
        summed = dist.all_reduce(grad_hidden, group=group, async_op=True)
    _, grad_weight, grad_bias = backward_op(
        OpInputs(hidden, weight, local, bias, scalars),
        grad_logps,
        (row_state, share, retained),
        need_hidden=False,
        need_weight=need_weight,
        need_bias=need_bias,
    )
    if grad_hidden is not None and summed is not None:
        summed.wait()
        grad_hidden = grad_hidden.to(hidden.dtype)
    return grad_hidden, grad_weight if need_weight else None, grad_bias if need_bias else None


def _gather(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[R, ...]: every rank's values, in the order of ranks."""
    gathered = values.new_empty((dist.get_world_size(group), *values.shape))
    dist.all_gather(list(gathered.unbind()), values, group=group)
    return gathered


def _rank_in(group: dist.ProcessGroup) -> int:
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group is a {type(group).__name__}; it should be a torch.distributed.ProcessGroup")
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group does not have this process among its ranks; call token_logps on its ranks alone")
    return rank
