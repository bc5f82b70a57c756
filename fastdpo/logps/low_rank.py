"""token_logps for an output embedding with a low-rank update, weight + scaling * b a, that is never multiplied out.

Its logits are h weight^T + u b^T with u = scaling * h a^T: the product of the wide rows [h | u] and [weight | b]. So an
update is not lost in the rounding of a 16-bit weight that it is added to, and where weight is frozen, b's gradient is a
product of u's width alone. How the wide rows come about is plain differentiable torch; low_rank_rows.py does the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.logps.dense import refuse_not_dense
from fastdpo.logps.graphs import outside_of_graphs
from fastdpo.logps.low_rank_rows import ALIGNMENT, WideRows, wide_logps
from fastdpo.logps.native import compute_dtype
from fastdpo.logps.ops import OUTPUTS, OpInputs
from fastdpo.logps.scored import ScoredRows
from fastdpo.logps.sharded import gathered, refuse_sharded


@dataclass(frozen=True, slots=True, eq=False)
class LowRankUpdate:
    """scaling * b a, added to an output embedding [V, H] (LoRA: Hu et al. 2021, arXiv 2106.09685).

    Attributes:
        a: [r, H], and b: [V, r], of floating dtypes. Used, and their gradients computed, in float32 (float64 for
            float64 hidden).
        scaling: alpha / r, or alpha / sqrt(r) with rank stabilisation.
        hidden: [..., H], what ``a`` is applied to where it is not ``hidden`` itself (after dropout, say); of its shape.
    """

    a: Tensor
    b: Tensor
    scaling: float = 1.0
    hidden: Tensor | None = None


@outside_of_graphs("token_logps(low_rank=...) runs outside of compiled graphs")
def low_rank_logps(
    inputs: OpInputs, updates: Sequence[LowRankUpdate], retain_bytes: int, outputs: Sequence[str]
) -> tuple[Tensor, ...]:
    """As ``differentiable_logps``, with the updates added to the weight."""
    hidden, weight, targets, bias, scalars = inputs
    updates = [replace(update, a=gathered(update.a), b=gathered(update.b)) for update in updates]
    for update in updates:
        refuse_sharded(hidden=update.hidden)
        refuse_not_dense(**{f"low_rank's {name}": getattr(update, name) for name in ("a", "b", "hidden")})
        _check(update, hidden, weight)
    rows = ScoredRows.find(targets, scalars, weight.shape[0])
    picked = rows.pick(hidden)
    u = torch.cat([_inner(update, picked, rows) for update in updates], 1)
    b = torch.cat([update.b.to(u.dtype) for update in updates], 1)
    if u.dtype != hidden.dtype:
        u, b = _in_parts(u, b, hidden.dtype)
    padding = picked.new_zeros(len(picked), -(picked.shape[1] + u.shape[1]) % ALIGNMENT)
    wide = torch.cat([picked, padding, u.to(hidden.dtype)], 1)
    problem = WideRows(wide, weight, b, bias, rows.pick(targets), scalars | {"num_scored": len(picked)})
    names = tuple(name for name in OUTPUTS if name in outputs)
    logps, *extras = wide_logps(problem, retain_bytes, names)
    return rows.spread(logps, dict(zip(names, extras, strict=True)))


def _inner(update: LowRankUpdate, hidden: Tensor, rows: ScoredRows) -> Tensor:
    """The update's u [S, r], in the compute type; ``hidden`` are the scored rows."""
    taken = hidden
    if update.hidden is not None:
        taken = rows.pick(update.hidden.reshape(-1, hidden.shape[1]))
    dtype = compute_dtype(hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        return update.scaling * F.linear(taken.to(dtype), update.a.to(dtype))


def _in_parts(u: Tensor, b: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """u [S, 3r] and b [V, 3r] whose numbers ``dtype`` can hold: (u + u') (b + b')^T without u' b'^T, u' the rounding.

    The roundings take no gradient of their own: u's is then that of u b^T and u b'^T, and b's that of u b^T and u' b^T.
    """
    u_rounded, b_rounded = u.to(dtype).to(u.dtype), b.to(dtype).to(b.dtype)
    u_rest, b_rest = (u - u_rounded).detach(), (b - b_rounded).detach()
    return torch.cat([u_rounded, u_rest, u_rounded], 1), torch.cat([b_rounded, b_rounded, b_rest], 1)


def _check(update: LowRankUpdate, hidden: Tensor, weight: Tensor) -> None:
    a, b = update.a, update.b
    vocabulary, width = weight.shape
    if a.dim() != 2 or a.shape[1] != width or a.shape[0] == 0:
        raise ValueError(f"low_rank's a has shape {tuple(a.shape)}; it should be [r, {width}], r at least 1")
    if b.shape != (vocabulary, a.shape[0]):
        raise ValueError(f"low_rank's b has shape {tuple(b.shape)}; it should be {(vocabulary, a.shape[0])}, [V, r]")
    if update.hidden is not None and (update.hidden.shape[-1:], update.hidden.numel()) != ((width,), hidden.numel()):
        raise ValueError(
            f"low_rank's hidden has shape {tuple(update.hidden.shape)}; it should be hidden's, [..., {width}], of "
            f"{hidden.numel()} numbers"
        )
    for name, tensor in (("a", a), ("b", b), ("hidden", update.hidden)):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"low_rank's {name} has dtype {tensor.dtype}; it should be a floating dtype")
        if tensor.device != hidden.device:
            raise ValueError(f"low_rank's {name} is on {tensor.device}, hidden on {hidden.device}")
