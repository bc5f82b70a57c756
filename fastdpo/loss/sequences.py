"""The sequences of a batch: where their scored tokens are, and sums over them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fastdpo.logps.wide import segment_sums, widened
from fastdpo.loss.sequence_parallel import sum_over_group


class Sequences:
    """S sequences of scored tokens: rows of ``targets``, or packed one after another.

    A sequence is one segment, or with ``at_shorter`` several: it is divided at the length of the shorter completion of
    every pair that it is of (LD-DPO, Liu et al. 2024, arXiv 2409.06411). Where the first half of the sequences is
    chosen and the second rejected, these are two.

    Args:
        targets: [S, T], or [N] with ``cu_seqlens``.
        cu_seqlens: [S + 1] int64 or int32, the packed sequences' bounds: 0, …, N.
        ignore_index: the target of positions that are not scored.
        members: [U, K] int64, the sequences that each loss is of (with ``at_shorter`` [P, 2], pairs), filled up with
            -1; None for pairs of the first half, the chosen ones, and the second.
        at_shorter: divide the sequences.
        look: whether the host may look at the tensors' values, which on a device it waits for.
        allow_empty: whether a sequence may have no scored token.
        group: the ranks that have a part of every sequence each; sums are then over all of them.

    Attributes:
        tokens: [S] int64, the scored tokens of each sequence.
        lengths: [S, C] int64, the scored tokens of each segment; C = 1 unless ``at_shorter``.
        counts: on the host, the scored tokens of each sequence that are here; None unless ``look``.

    Raises:
        TypeError, ValueError: the layout is neither of the two; a sequence of a loss in which nothing is scored,
            unless allowed (if ``look``).
    """

    def __init__(
        self,
        targets: Tensor,
        cu_seqlens: Tensor | None,
        ignore_index: int,
        *,
        at_shorter: bool,
        look: bool,
        members: Tensor | None = None,
        allow_empty: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        _check_layout(targets, cu_seqlens, look=look, halves=members is None)
        self._cu_seqlens = None if cu_seqlens is None else cu_seqlens.to(torch.int64)
        self._tokens_in_all = targets.numel()
        self.group = group
        scored = targets != ignore_index
        here = self._sums_here(scored)
        self.tokens = here if group is None else sum_over_group(here, group)
        self.lengths = self.tokens.unsqueeze(1)
        self.counts: Sequence[int] | None = here.tolist() if look else None
        if self.counts is not None and not allow_empty:
            counts = self.counts if group is None else self.tokens.tolist()
            _refuse_empty(counts, None if members is None else {*members.flatten().tolist()}, ignore_index)
        self._within: Tensor | None = None
        self._bounds: Tensor | None = None
        if at_shorter and members is not None:
            self.lengths = _cut_at_shorter(self.tokens, members, look=look)
            # Where as many tokens are scored before: what is not scored may stand on either side.
            reached = F.pad(scored.flatten().cumsum(0), (1, 0))
            self._bounds = torch.searchsorted(reached, F.pad(self.lengths.flatten().cumsum(0), (1, 0)))
        elif at_shorter:
            shorter = torch.minimum(*self.tokens.chunk(2)).repeat(2)
            self._within = self._places(scored) < self._of_each_token(shorter)
            self.lengths = torch.stack((shorter, self.tokens - shorter), dim=1)

    def sums(self, values: Tensor) -> Tensor:
        """[S] sums over the sequences of ``values``, which have targets' shape and are 0 where nothing is scored.

        Without atomics, so that results repeat. Floats are summed in float64: a sequence's log-probability is hundreds
        of nats, a loss depends on differences of four of them, and float32 would round each by more than all the
        tokens' errors come to.
        """
        sums = self._sums_here(values)
        return sums if self.group is None else sum_over_group(sums, self.group)

    def _sums_here(self, values: Tensor) -> Tensor:
        if values.is_floating_point():
            values = widened(values)
        elif values.dtype == torch.bool:
            values = values.to(torch.int64)
        if self._cu_seqlens is None:
            return values.sum(-1)
        if not values.is_floating_point():  # segment_sums takes floats alone
            totals = F.pad(values.cumsum(0), (1, 0))
            return totals[self._cu_seqlens[1:]] - totals[self._cu_seqlens[:-1]]
        return segment_sums(values, self._cu_seqlens)

    def segment_sums(self, values: Tensor) -> Tensor:
        """[S, C] sums over the segments, float64."""
        if self._bounds is not None:
            return segment_sums(widened(values.flatten()), self._bounds).view(self.lengths.shape)
        if self._within is None:
            return self.sums(values).unsqueeze(1)
        parts = (values.where(self._within, 0), values.where(~self._within, 0))
        return torch.stack([self.sums(part) for part in parts], dim=1)

    def _places(self, scored: Tensor) -> Tensor:
        """Of targets' shape: how many tokens of its sequence are scored before each."""
        before = scored.to(torch.int64).cumsum(-1) - scored.to(torch.int64)
        if self._cu_seqlens is None:
            return before
        starts = F.pad(self.tokens.cumsum(0), (1, 0))[:-1]
        return before - self._of_each_token(starts)

    def _of_each_token(self, values: Tensor) -> Tensor:
        """[S] to targets' shape, or what broadcasts to it."""
        if self._cu_seqlens is None:
            return values.unsqueeze(1)
        return values.repeat_interleave(self._cu_seqlens.diff(), output_size=self._tokens_in_all)


def count_sequences(targets: Tensor, cu_seqlens: Tensor | None, *, halves: bool) -> int:
    """S, from shapes alone; TypeError or ValueError where they are those of neither layout.

    ``halves``: the first half of the sequences is chosen, and the second rejected.
    """
    _check_layout(targets, cu_seqlens, look=False, halves=halves)
    return targets.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1


def _cut_at_shorter(tokens: Tensor, pairs: Tensor, *, look: bool) -> Tensor:
    """[S, C]: sequences of ``tokens`` [S] cut at the length of the shorter completion of each of their pairs."""
    shorter = torch.minimum(tokens[pairs[:, 0]], tokens[pairs[:, 1]])
    sequences = torch.arange(len(tokens), device=tokens.device).view(-1, 1, 1)
    is_of = (pairs == sequences).any(2)
    cuts = torch.where(is_of, shorter, tokens.unsqueeze(1)).sort(1).values
    if look:  # no more than the most pairs that a sequence is of
        cuts = cuts[:, : int(is_of.sum(1).max())]
    return torch.diff(cuts, dim=1, prepend=torch.zeros_like(tokens).unsqueeze(1), append=tokens.unsqueeze(1))


def _check_layout(targets: Tensor, cu_seqlens: Tensor | None, *, look: bool, halves: bool) -> None:
    if cu_seqlens is None:
        if targets.dim() != 2 or targets.shape[0] == 0 or (halves and targets.shape[0] % 2):
            wanted = "[2B, T], an even number of rows, chosen rows first" if halves else "[S, T]"
            raise ValueError(
                f"targets has shape {tuple(targets.shape)}; it should be {wanted}; or give cu_seqlens for packed "
                "sequences"
            )
        return
    if targets.dim() != 1:
        raise ValueError(f"targets has shape {tuple(targets.shape)}; with cu_seqlens it should be [N]")
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or (halves and cu_seqlens.numel() % 2 == 0):
        wanted = "[2B + 1]: the bounds of the B chosen and then the B rejected sequences"
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; it should be "
            f"{wanted if halves else '[S + 1]: the bounds of the sequences'}"
        )
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens has dtype {cu_seqlens.dtype}; it should be torch.int64 or torch.int32")
    if cu_seqlens.device != targets.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, targets on {targets.device}; they should be on one")
    if look:
        bounds = cu_seqlens.tolist()
        ordered = all(a <= b for a, b in zip(bounds, bounds[1:], strict=False))
        if bounds[0] != 0 or bounds[-1] != targets.numel() or not ordered:
            raise ValueError(f"cu_seqlens should rise from 0 to N = {targets.numel()}; it is {bounds}")


def _refuse_empty(counts: Sequence[int], members: set[int] | None, ignore_index: int) -> None:
    """ValueError where a completion has no scored token: its log-probability would mean nothing."""
    pairs = len(counts) // 2
    empty = [
        f"{'chosen' if i < pairs else 'rejected'} of pair {i % pairs}" if members is None else f"sequence {i}"
        for i, n in enumerate(counts)
        if n == 0 and (members is None or i in members)
    ]
    if empty:
        raise ValueError(
            f"targets has completions in which every position is ignore_index ({ignore_index}): {', '.join(empty[:8])}"
            f"{', …' if len(empty) > 8 else ''}; each should score at least one token: drop these pairs, "
            "or give allow_empty=True"
        )
