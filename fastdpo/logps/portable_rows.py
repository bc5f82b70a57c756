"""The rows that the portable path computes: which of N they are, and what each sums (csrc/fastdpo.h, in PyTorch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastdpo.logps.targets import refuse_foreign_targets

# kMaxExponentGap of csrc/fastdpo.h.
_MAX_EXPONENT_GAP = 32.0


def may_look(device: torch.device) -> bool:
    """Whether the host has values at hand: elsewhere it waits for the device, and cannot in a captured graph."""
    return device.type == "cpu"


def is_capturing(device: torch.device) -> bool:
    """Whether what is queued on the device's stream goes into a graph that is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class Doubt(NamedTuple):
    """What the host has not seen of the targets: rows computed for nothing, and rows that should have been."""

    ignored: Tensor  # [S] bool, computed, with a target that is ignored
    wrong: Tensor  # [S] bool, computed, with a target that is no entry of the vocabulary: NaN
    missed: Tensor  # [N - S] bool, not computed, with a target that is not ignored: NaN


@dataclass(frozen=True, slots=True)
class ComputedRows:
    """S of N rows, the scored ones in order.

    Attributes:
        entries: [S], their targets; some entry of the vocabulary where a target is none.
        positions: [S] int64, or None where row i is position i, for all N.
        others: [N - S], the positions of the other rows; None with ``positions``.
        doubt: None where the host has looked.
    """

    entries: Tensor
    positions: Tensor | None = None
    others: Tensor | None = None
    doubt: Doubt | None = None

    @classmethod
    def find(cls, targets: Tensor, ignore_index: int, num_scored: int, vocabulary: int) -> ComputedRows:
        """The host looks where it may, and where it has to: without num_scored, unless a graph is being captured.

        Raises:
            ValueError: num_scored is wrong, and the host has looked.
            IndexError: a target outside the vocabulary, and the host has looked.
        """
        scored = targets != ignore_index
        looks = may_look(targets.device) or (num_scored < 0 and not is_capturing(targets.device))
        if looks:
            refuse_foreign_targets(targets, scored, vocabulary, ignore_index)
            count = int(scored.sum())
            if num_scored not in (-1, count):
                raise ValueError(
                    f"num_scored is {num_scored}; targets has {count} that are not ignore_index ({ignore_index})"
                )
            if count == len(targets):
                return cls(targets)
        else:
            # A graph's replays may find any number of scored rows: then all rows are computed.
            count = len(targets) if num_scored < 0 else num_scored
        order = scored.logical_not().to(torch.int32).argsort(stable=True)
        positions, others = order[:count], order[count:]
        of_rows = targets.index_select(0, positions)
        if looks:
            return cls(of_rows, positions, others)
        ignored, inside = of_rows == ignore_index, (of_rows >= 0) & (of_rows < vocabulary)
        doubt = Doubt(ignored, ~(ignored | inside), scored.index_select(0, others))
        return cls(of_rows.clamp(0, vocabulary - 1), positions, others, doubt)

    def pick(self, values: Tensor, begin: int, end: int) -> Tensor:
        """Computed rows [begin, end) of ``values`` [N, ...]: a view where it can be."""
        if self.positions is None:
            return values[begin:end]
        return values.index_select(0, self.positions[begin:end])

    def put(self, values: Tensor, into: Tensor, begin: int) -> None:
        """``values`` [n, ...] of the computed rows from ``begin`` on, to where they belong in ``into`` [N, ...]."""
        end = begin + len(values)
        if self.positions is None:
            into[begin:end] = values
        else:
            into.index_copy_(0, self.positions[begin:end], values)

    def correct(self, results: Tensor, ignored: Tensor) -> None:
        """Sets rows of ``results`` [N, K] about which there was doubt; ``ignored`` [K] is what ignored rows have."""
        if self.doubt is None or self.positions is None or self.others is None:
            return
        found = results.index_select(0, self.positions)
        found = torch.where(self.doubt.ignored.unsqueeze(1), ignored, found)
        results.index_copy_(0, self.positions, found.masked_fill(self.doubt.wrong.unsqueeze(1), torch.nan))
        missed = self.doubt.missed.unsqueeze(1)
        results.index_copy_(0, self.others, torch.where(missed, torch.nan, ignored))


class RowResults(NamedTuple):
    """RowResult, of n rows."""

    logp: Tensor
    norm: Tensor
    one_minus_p: Tensor
    entropy: Tensor
    log_sum_sq_probs: Tensor
    mean_logit: Tensor
    top_gap: Tensor


class RowSums:
    """RowSums, of n rows: over the entries other than the target, relative to an exponent, each [n] of one dtype.

    ``logit_sum`` alone has the target's as well.
    """

    def __init__(self, target_logit: Tensor) -> None:
        # A masked target would make z_j - k undefined where z_j is masked too.
        self.target_logit, self.exponent = target_logit, target_logit.clamp(min=torch.finfo(torch.float32).min)
        self.sum, self.weighted_sum, self.square_sum, self.logit_sum = target_logit.new_zeros(4, len(target_logit))
        self.max_logit = torch.full_like(target_logit, -torch.inf)

    def exponent_for(self, largest: Tensor) -> Tensor:
        """The exponent where entries as large as ``largest`` come: as it is, or raised to them. NaN raises nothing."""
        return torch.where(largest - self.exponent > _MAX_EXPONENT_GAP, largest, self.exponent)

    def raise_to(self, exponent: Tensor) -> Tensor:
        """Shrinks what was formed with the old exponent; returns the factor's logarithm, 0 where it stays."""
        shift = shift_between(self.exponent, exponent)
        factor = shift.exp()
        self.weighted_sum = factor * (self.weighted_sum + shift * self.sum)
        self.sum = factor * self.sum
        self.square_sum = factor * factor * self.square_sum
        self.exponent = exponent
        return shift

    def finish(self, vocabulary: int) -> RowResults:
        gap = self.target_logit - self.exponent  # exactly 0 unless the exponent was raised
        target_term = gap.exp()
        norm = self.sum + target_term
        log_norm = torch.where(gap == 0, self.sum.log1p(), norm.log())
        target_weighted = (target_term * gap).masked_fill(target_term == 0, 0.0)
        # Infinities of one sign are a tie as equal numbers are, and their difference is no number.
        top_gap = (self.max_logit - self.target_logit).masked_fill(self.max_logit == self.target_logit, 0.0)
        return RowResults(
            logp=gap - log_norm,
            norm=norm,
            one_minus_p=self.sum / norm,
            entropy=log_norm - (self.weighted_sum + target_weighted) / norm,
            log_sum_sq_probs=(self.square_sum + target_term * target_term).log() - 2 * log_norm,
            mean_logit=self.logit_sum / vocabulary,
            top_gap=top_gap,
        )


def shift_between(exponent: Tensor, later: Tensor) -> Tensor:
    """exponent - later, the logarithm of what a raise shrinks by; 0 also where both are the same infinity."""
    return (exponent - later).masked_fill(exponent == later, 0.0)


def shrink_(values: Tensor, shift: Tensor) -> Tensor:
    """values [n, m] times exp(shift) [n], in place. In two steps: float32 ends at e^-104, where e^32 has not shrunk
    to nothing."""
    half = (shift / 2).exp().to(values.dtype).unsqueeze(1)
    return values.mul_(half).mul_(half)
