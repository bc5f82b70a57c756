"""The loss of a batch taken in groups: a group's gradients are computed as soon as its losses are known.

Where a pair's loss follows from its own log-probabilities, c = dL/dlogp of a group of pairs is there as soon as these
are. So the forward goes on to the group's gradients, and the exponentials and directions that they need are freed
before the next group; the backward has but to multiply by the gradient of the loss. Sequences that pairs (or rankings)
link are in one group.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.logps.derivatives import first_derivative, refuse_forward_mode
from fastdpo.logps.native import compute_dtype, operand_dtype
from fastdpo.logps.ops import OpInputs, backward_op, forward_op, named_outputs
from fastdpo.logps.targets import refuse_foreign_targets
from fastdpo.logps.wide import segment_sums, wide_dtype, widened
from fastdpo.loss.group_plan import Plan, plan_frozen_groups, plan_groups
from fastdpo.loss.units import Components, Part, Units, merged, runs

# Losses [n] of a part's units, from the log-probabilities [s, C] of their sequences' segments and the sums [s] of
# token-wise outputs; of all without one.
LossesOf = Callable[[Tensor, Mapping[str, Tensor], Part | None], Tensor]

# Numbers multiplied at a time where a product of another dtype takes a temporary of as many.
_PART = 1 << 24


def row_bytes(inputs: OpInputs) -> int:
    """What one token's exponentials take up in memory."""
    return inputs.weight.shape[0] * operand_dtype(inputs.weight.dtype).itemsize


def plan_of(inputs: OpInputs, weight: Tensor, bias: Tensor | None, tokens: Sequence[int], workspace: int) -> Plan:
    """The plan for components of ``tokens`` scored tokens; ``weight`` and ``bias`` are the tensors that may train."""
    if not (weight.requires_grad or (bias is not None and bias.requires_grad)):
        return plan_frozen_groups(tokens)
    compute = compute_dtype(inputs.weight.dtype)
    sums = weight.requires_grad and weight.dtype != compute
    sum_bytes = weight.numel() * compute.itemsize if sums else 0
    return plan_groups(tokens, workspace=workspace, row_bytes=row_bytes(inputs), sum_bytes=sum_bytes)


class GroupedBatch(NamedTuple):
    """A batch, and how it is taken.

    Attributes:
        inputs: hidden, weight and bias as the ops take them.
        lengths: [S, C] int64, the scored tokens of each sequence's C segments; segments and sequences lie one after
            another in ``inputs``.
        counts: the scored tokens of each sequence on the host.
        units: what the losses are of.
        components: which of them and of the sequences belong together.
        plan: which components come together, and how much of each group is kept.
        losses_of: the losses. It must not look beyond the part that it is given.
        outputs: names of the policy's token-wise outputs, in the order of OUTPUTS.
    """

    inputs: OpInputs
    lengths: Tensor
    counts: Sequence[int]
    units: Units
    components: Components
    plan: Plan
    losses_of: LossesOf
    outputs: tuple[str, ...] = ()


def grouped_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, batch: GroupedBatch
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The mean of the losses, connected to autograd once; detached, the segments' log-probabilities [S, C] float64; and
    sums [S] float64 over the sequences of each of ``batch.outputs``.

    ``hidden``, ``weight`` and ``bias`` are what the gradients are for, as the caller has them.

    Raises:
        IndexError: a target outside [0, V); on CUDA that row is NaN.
    """
    loss, sums, extras = _GroupedLoss.apply(hidden, weight, bias, batch)  # type: ignore[no-untyped-call]
    return loss, sums, dict(zip(batch.outputs, extras, strict=True))


class _GroupedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        batch: GroupedBatch,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs, lengths, counts, units, components, plan, losses_of, outputs = batch
        starts = [0, *accumulate(counts)]
        scored = _scored_positions(inputs, starts[-1])
        gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad[:3], compute_dtype(inputs.hidden.dtype))
        wide = torch.promote_types(gradients.compute, wide_dtype(hidden.device))
        sums = hidden.new_empty(lengths.shape, dtype=wide)
        extras = hidden.new_empty((len(outputs), len(counts)), dtype=wide)
        for first, last in plan.groups:
            sequences = runs(merged(components.sequences[first:last]))
            rows = _together([scored[starts[run.start] : starts[run.stop]] for run in sequences])
            # Where every position is scored, those of neighbours are neighbours: they need not be copied.
            lies_so = len(sequences) == 1 and starts[-1] == len(scored) == len(inputs.targets)
            where = slice(starts[sequences[0].start], starts[sequences[0].stop]) if lies_so else rows
            group = inputs._replace(
                hidden=inputs.hidden[where],
                targets=inputs.targets[where],
                scalars=inputs.scalars | {"num_scored": len(rows)},
            )
            part = _part_of(units, sequences, merged(components.units[first:last]))
            of_group = gradients.take(
                group,
                rows,
                _together([lengths[run] for run in sequences]),
                plan.kept,
                partial(_gradient_of_mean, losses_of, units, part),
                outputs,
            )
            sizes = [run.stop - run.start for run in sequences]
            for run, group_sums, group_extras in zip(sequences, *(x.split(sizes) for x in of_group), strict=True):
                sums[run], extras[:, run] = group_sums, group_extras.T

        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias)
        with torch.enable_grad():  # tensors without a number, by which a second derivative finds the way to the inputs
            ctx.anchors = [None if x is None else x[..., :0].clone() for x in (hidden, weight, bias)]
        ctx.mark_non_differentiable(sums, extras)
        losses = losses_of(sums, dict(zip(outputs, extras, strict=True)), None)
        return units.mean(losses).to(gradients.compute), sums, extras

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        saved, dtypes = ctx.saved_tensors, ctx.dtypes

        def gradients(grad_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
            return tuple(None if g is None else _times(g, grad_loss, t) for g, t in zip(saved, dtypes, strict=True))

        return *first_derivative(gradients, grad_loss, *ctx.anchors), None

    jvp = staticmethod(refuse_forward_mode)


class _Gradients:
    """Where the groups' gradients come together: hidden's rows, and the sums of weight's and bias's.

    Args:
        needs: of which of hidden, weight and bias the gradient is needed; the others' are None.
        compute: the dtype of the sums.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: Sequence[bool], compute: torch.dtype
    ) -> None:
        self.compute = compute
        # float16 would lose small gradients before the loss's scale, by which the backward multiplies, can save them.
        of_hidden = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        self.hidden, self.weight, self.bias = (
            None if x is None or not need else torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format)
            for x, need, dtype in zip((hidden, weight, bias), needs, (of_hidden, compute, compute), strict=True)
        )

    def take(
        self,
        group: OpInputs,
        rows: Tensor,
        lengths: Tensor,
        kept: int,
        gradient: Callable[[Tensor, Mapping[str, Tensor]], Tensor],
        outputs: tuple[str, ...],
    ) -> tuple[Tensor, Tensor]:
        """The sums over a group's segments [s, C], and of ``outputs`` over its sequences [s, E]; adds the gradients.

        ``rows`` are the group's positions among all, ``lengths`` [s, C] its segments' tokens, ``kept`` how many
        tokens' exponentials are kept at most; ``gradient`` maps the sums to dL/dsums [s, C].
        """
        head = self.weight is not None or self.bias is not None
        retain_bytes = min(kept, len(rows)) * row_bytes(group) if head else 0
        token_logps, row_state, direction, retained, *extras = forward_op(
            group, need_direction=self.hidden is not None, retain_bytes=retain_bytes, outputs=outputs
        )
        segments = lengths.flatten()
        sums = _segment_sums(token_logps, segments).view(lengths.shape)
        fields = named_outputs(extras, outputs, group)
        named = {name: _segment_sums(value, lengths.sum(1)) for name, value in fields.items()}
        of_segments = gradient(sums, named).to(self.compute).flatten()
        grad_logps = of_segments.repeat_interleave(segments, output_size=len(rows))
        if head:
            backward_op(
                group,
                grad_logps,
                (row_state, direction, retained),
                need_hidden=False,
                need_weight=self.weight is not None,
                need_bias=self.bias is not None,
                weight_sum=self.weight,
                bias_sum=self.bias,
            )
        if self.hidden is not None:
            of_rows = direction.mul_(grad_logps.unsqueeze(1)).to(self.hidden.dtype)
            self.hidden.view(-1, self.hidden.shape[-1]).index_copy_(0, rows, of_rows)
        return sums, torch.stack([named[name] for name in outputs], dim=1) if outputs else sums.new_empty(len(sums), 0)


def _segment_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """[n] float64 sums over n segments that lie one after another."""
    return segment_sums(widened(values), F.pad(lengths.cumsum(0), (1, 0)))


def _scored_positions(inputs: OpInputs, count: int) -> Tensor:
    """[count] positions whose target is scored, in order; IndexError where one is no entry of the vocabulary.

    On CUDA nothing is waited for, and so nothing raised: the op marks such a row with NaN.
    """
    ignore_index = inputs.scalars["ignore_index"]
    scored = inputs.targets != ignore_index
    if not scored.is_cuda:
        # The ops check as well, but of a group they would name the wrong position.
        refuse_foreign_targets(inputs.targets, scored, inputs.weight.shape[0], ignore_index)
    return torch.nonzero_static(scored, size=count).squeeze(1)


def _part_of(units: Units, sequences: Sequence[slice], which: Sequence[int]) -> Part:
    """The losses ``which``, where the sums of ``sequences``, runs of neighbours, are at hand."""
    (run, *others) = runs(which) or [slice(0, 0)]
    if units.members is None:  # one run: of the pairs, and of each half
        return Part(run, None)
    device = units.members.device
    rows: slice | Tensor = torch.tensor(which, device=device) if others else run
    at_hand = torch.cat([torch.arange(run.start, run.stop, device=device) for run in sequences])
    places = torch.zeros(units.sequences, dtype=torch.int64, device=device)
    places[at_hand] = torch.arange(len(at_hand), device=device)
    members = units.members[rows]
    # What fills up a ranking has no place; any will do.
    return Part(rows, places.index_select(0, members.clamp(min=0).flatten()).view(members.shape))


def _together(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _gradient_of_mean(
    losses_of: LossesOf, units: Units, part: Part, sums: Tensor, extras: Mapping[str, Tensor]
) -> Tensor:
    """d(mean of all losses) / d(sums) of the sequences of a part's losses, [s, C]."""
    with torch.enable_grad():
        leaf = sums.detach().requires_grad_()
        return torch.autograd.grad(units.share(losses_of(leaf, extras, part), part), leaf)[0]


# Private, and only saves a copy: without it every graph counts as kept.
_graph_is_kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


def _times(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * factor, rounded once to dtype; the gradient itself where a factor of 1 lets it be given away."""
    # A device's factor cannot be looked at without waiting. What is given away may be changed by whoever gets it, so a
    # graph that may be gone through again keeps its own.
    if not factor.is_cuda and factor.item() == 1 and not (gradient.dtype == dtype and _graph_is_kept()):
        return gradient.to(dtype)
    result = torch.empty_like(gradient, dtype=dtype)
    for out, part in zip(torch.split(result.view(-1), _PART), torch.split(gradient.view(-1), _PART), strict=True):
        # A 0-dim factor would be rounded to the 16 bits of a gradient that has no more.
        torch.mul(part.to(factor.dtype), factor, out=out)
    return result
