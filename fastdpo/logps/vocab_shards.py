"""Log-probabilities over a vocabulary that is cut into shards: from each shard's rows to the whole's, and back.

The ops see a shard as if it were the vocabulary. A row's entry in a shard is its target where the shard has it, and a
stand-in elsewhere. From a shard's row comes its log-sum-exp, lse_s; with lse that of all shards, the shard has the mass
P_s = exp(lse_s - lse), and with s the shard that has the target

    logp = logp_s - log1p(sum over the other shards of exp(lse_r - lse_s)),

two numbers that are never above 0: nothing cancels, and p -> 1 stays exact. The gradients come out of the same backward
op, from a row state that speaks of all shards (csrc/fastdpo.h, RowState): the norm relative to the row's exponent, and
the entry's weight, which is (1 - p) d z / d (h.w) for a target and -p d z / d (h.w) for a stand-in.

Pure functions on one process' tensors. Every row is scored; per-row numbers are float64 whatever the inputs, where
the device has that (wide.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo.logps.device_paths import is_portable
from fastdpo.logps.wide import widened

# Of row_state, as csrc/fastdpo.h.
_EXPONENT, _NORM, _TARGET_WEIGHT = range(3)

# An exponent is raised when a logit lies further than this above it (kMaxExponentGap in csrc/fastdpo.h).
_MAX_EXPONENT_GAP = 32.0


class ShardRows(NamedTuple):
    """What one shard says of its rows, each [N]."""

    owned: Tensor  # bool: the entry is the target
    empty: Tensor  # bool: every entry of the shard is masked by a bias of -inf
    exponent: Tensor  # the op's
    entry_weight: Tensor  # the op's target weight, of the entry within the shard
    entry_logp: Tensor  # of the entry within the shard
    entry_logit: Tensor
    lse: Tensor  # log of the sum over the shard of exp(z_j)


class WholeRows(NamedTuple):
    """What all shards together say, each [N]."""

    logp: Tensor  # of the target
    lse: Tensor  # log of the sum over the vocabulary of exp(z_j)


def stand_in_entry(bias: Tensor | None) -> Tensor | int:
    """An entry that is not masked by the bias, if the shard has one.

    Any such will do. A row whose stand-in lies far below its greatest logit has its exponent raised, within the first
    tile or chunk of the vocabulary as a rule, where that costs little.
    """
    return 0 if bias is None else bias.argmax()


def local_targets(targets: Tensor, start: Tensor | int, size: int, stand_in: Tensor | int) -> tuple[Tensor, Tensor]:
    """Each row's entry in the shard of entries [start, start + size), and whether it is the row's target."""
    local = targets - start
    owned = (local >= 0) & (local < size)
    return local.where(owned, stand_in), owned


def shard_rows(logps: Tensor, row_state: Tensor, owned: Tensor) -> ShardRows:
    """From what the forward op returned for the shard."""
    exponent, norm, entry_weight = widened(row_state).unbind()
    # Where a shard is masked as a whole, its rows are quotients of zeros.
    empty = norm == 0
    entry_logp = widened(logps).masked_fill(empty, -torch.inf)
    lse = exponent + norm.log()
    # The exponent is the entry's logit, exactly, unless it was raised, and then it lies far above.
    logit = lse + entry_logp
    logit = torch.where(exponent - logit < _MAX_EXPONENT_GAP / 2, exponent, logit)
    return ShardRows(owned, empty, exponent, entry_weight.masked_fill(empty, 0.0), entry_logp, logit, lse)


def shard_stats(rows: ShardRows, outputs: Mapping[str, Tensor]) -> Tensor:
    """[K, N]: what the shard has to tell the others, of which :func:`combine` makes the whole.

    ``outputs`` are the op's, by the names of what is made of them (OUTPUTS in ops.py): is_top1 stands for top_gap.
    """
    elsewhere = ~rows.owned
    stats = [rows.lse, rows.entry_logp.masked_fill(elsewhere, -torch.inf)]
    for name, values in outputs.items():
        values = widened(values)
        if name == "is_top1":
            # The target's logit, and the greatest of the others, of which a stand-in is one.
            rival = rows.entry_logit + values
            rival = rival.where(rows.owned, torch.maximum(rival, rows.entry_logit))
            stats += [rows.entry_logit.masked_fill(elsewhere, -torch.inf), rival]
        else:
            stats.append(values if name == "mean_logits" else values.masked_fill(rows.empty, 0.0))
    return torch.stack(stats)


def combine(stats: Tensor, owner: Tensor, sizes: Tensor, names: Sequence[str]) -> tuple[WholeRows, dict[str, Tensor]]:
    """The whole, and its outputs by name, each [N].

    Args:
        stats: [R, K, N], the shards' :func:`shard_stats` with outputs called ``names``.
        owner: [N], the shard that has the row's target.
        sizes: [R], the shards' entries.
    """
    lse, target_logp, *rest = stats.unbind(1)
    owner = owner.unsqueeze(0)
    others = lse.scatter(0, owner, -torch.inf).logsumexp(0)
    above = others - lse.gather(0, owner).squeeze(0)
    # The target's shard alone has a finite number there; log1p(exp(above)) is logaddexp(0, above).
    logp = target_logp.amax(0) - torch.logaddexp(torch.zeros_like(above), above)
    whole = WholeRows(logp, lse.logsumexp(0))

    outputs, remaining = {}, iter(rest)
    for name in names:
        values = next(remaining)
        if name == "entropy":
            mass = relative(lse, whole.lse)
            outputs[name] = (mass * values + torch.special.entr(mass)).sum(0)
        elif name == "log_sum_sq_probs":
            outputs[name] = (values + 2 * (lse - whole.lse)).logsumexp(0)
        elif name == "mean_logits":
            outputs[name] = (values * sizes.unsqueeze(1)).sum(0) / sizes.sum()
        else:
            target, rival = values.amax(0), next(remaining).amax(0)
            outputs[name] = (rival - target).masked_fill(rival == target, 0.0)
    return whole, outputs


def relative(lse: Tensor, to: Tensor) -> Tensor:
    """exp(lse - to): a shard's share of the mass; 0 where it has none, whatever the other is."""
    return (lse - to).exp().masked_fill(lse == -torch.inf, 0.0)


def entry_weights(rows: ShardRows, whole: WholeRows, scalars: Mapping[str, Any]) -> Tensor:
    """d logp / d (h . w_entry) [N]: of a target (1 - p) d z / d (h.w), of a stand-in -p d z / d (h.w)."""
    p = relative(rows.lse, whole.lse) * rows.entry_logp.exp()
    return torch.where(rows.owned, -whole.logp.expm1(), -p) * _logit_slope(rows.entry_logit, scalars)


def op_row_state(rows: ShardRows, whole: WholeRows, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """[3, N]: what the backward op wants of the shard, so that its gradients are the whole's.

    ``weights`` are the rows' :func:`entry_weights`, ``dtype`` is that of the forward op's row state.
    """
    # Where the whole lies this far above the shard, its entries' probabilities are below e^32 / 1e27, and show nowhere.
    # But the norm must be finite, also times a target's weight, and leave something of 1 / norm: the CUDA back end
    # has them all in one product (see set_kept_targets).
    largest = torch.finfo(dtype).max
    most = torch.full_like(whole.lse, largest**0.98).masked_fill(rows.owned, largest**0.7)
    return torch.stack([rows.exponent, (whole.lse - rows.exponent).exp().minimum(most), weights]).to(dtype)


def share_of_direction(direction: Tensor, rows: ShardRows, lse: Tensor, weights: Tensor, entries: Tensor) -> Tensor:
    """[N, H]: the shard's part of d logp / d hidden, which is the sum of all; in place of ``direction``, the op's.

    ``lse`` is that of the whole (or of what of it is known), ``weights`` the rows' :func:`entry_weights` there, and
    ``entries`` [N, H] their rows of weight. The op's direction has the entry with its weight within the shard.
    """
    mass = relative(rows.lse, lse)
    # In a shard that is masked as a whole the op divided by 0.
    direction.masked_fill_(rows.empty.unsqueeze(1), 0.0).mul_(mass.to(direction.dtype).unsqueeze(1))
    of_entry = (weights - mass * rows.entry_weight).to(direction.dtype).unsqueeze(1)
    return direction.addcmul_(of_entry, entries.to(direction.dtype))


def set_kept_targets(retained: Tensor, targets: Tensor, row_state: Tensor, scalars: Mapping[str, Any]) -> None:
    """Bring what is kept at the entries of the retained rows in line with ``row_state``, in place.

    It is the entry's weight in the units of the exponentials, so that one product adds both; the CPU kernels keep 0.
    """
    if not (retained.is_cuda or is_portable(retained.device)):
        return
    slope = scalars["logit_scale"] / scalars["temperature"]
    kept = row_state[:, : retained.shape[0]]
    values = torch.zeros_like(kept[_NORM]) if slope == 0 else kept[_TARGET_WEIGHT] * kept[_NORM] / -slope
    retained.scatter_(1, targets[: retained.shape[0]].unsqueeze(1), values.to(retained.dtype).unsqueeze(1))


def _logit_slope(logit: Tensor, scalars: Mapping[str, Any]) -> Tensor:
    """d z / d (h.w) where z is ``logit``: LogitTransform of csrc/fastdpo.h."""
    slope: float = scalars["logit_scale"] / scalars["temperature"]
    if scalars["softcap"] == 0:
        return torch.full_like(logit, slope)
    of_logit: Tensor = slope * (1 - (logit * (scalars["temperature"] / scalars["softcap"])).square())
    return of_logit
