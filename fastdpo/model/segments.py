"""What attends to what in a packed row.

A row is a tree of tokens, cut into segments. A segment's queries attend to their own segment causally, and before that
to all of its ancestors: ranges of tokens that other segments of the row begin with, from the root to the parent. So
``[prompt | chosen | rejected]`` is two segments, ``[prompt | chosen]``, and ``[rejected]`` with the prompt as its
ancestor; and a plain sequence is one segment without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

Range = tuple[int, int]


class Segment(NamedTuple):
    """Queries [begin, end) of a row; their keys are the ancestors, from the root on, and then their own, causally.

    The last ancestor is the beginning of another segment, the parent, and those before it are the parent's ancestors.
    """

    begin: int
    end: int
    ancestors: tuple[Range, ...] = ()

    @property
    def depth(self) -> int:
        """How many tokens come before the segment's own, on the way from the root."""
        return sum(end - begin for begin, end in self.ancestors)


class Segments:
    """What each token of a row attends to.

    Args:
        segments: none empty, one after another from 0 to the row's end, depth first: what hangs on a token follows it
            before anything that does not.

    Attributes:
        bounds: the segments, on the host.
        length: N, the row's tokens.
        cu_q, cu_k: [S + 1] int32, bounds of the segments' queries, and of their keys in ``key_index``.
        key_index: [K] int64, the keys of all segments one after another, as positions in the row; None where these are
            the row itself.
        max_q, max_k: the most queries, and the most keys, of a segment.
        query_sizes: the segments' lengths.
        piece_sizes: the lengths of pieces of the row, such that the keys of every segment are whole pieces.
        key_pieces: for each segment, which pieces its keys are, in order.

    Raises:
        ValueError: the segments leave a gap, or are no tree, or its order is not depth first.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.bounds = tuple(segments)
        ends = [0, *(s.end for s in self.bounds)]
        for s, previous_end in zip(self.bounds, ends, strict=False):
            if s.begin != previous_end or s.end <= s.begin:
                raise ValueError(f"{s} should begin at {previous_end}, and hold a token")
        self.length = ends[-1]
        self._subtree_ends = _subtree_ends(self.bounds)
        ranges = [[*s.ancestors, (s.begin, s.end)] for s in self.bounds]
        keys = [s.end - s.begin + s.depth for s in self.bounds]
        self.query_sizes = [s.end - s.begin for s in self.bounds]
        cuts = sorted({0, *(cut for of_one in ranges for r in of_one for cut in r)})
        self.piece_sizes = [b - a for a, b in zip(cuts, cuts[1:], strict=False)]
        piece_at = {cut: i for i, cut in enumerate(cuts)}
        self.key_pieces = [[i for a, b in of_one for i in range(piece_at[a], piece_at[b])] for of_one in ranges]
        self.max_q = max(self.query_sizes)
        self.max_k = max(keys)
        self.cu_q = torch.tensor(ends, dtype=torch.int32)
        self.cu_k = torch.tensor([0, *accumulate(keys)], dtype=torch.int32)
        self.key_index = None
        if any(s.ancestors for s in self.bounds):
            self.key_index = torch.cat([torch.arange(*r) for of_one in ranges for r in of_one])
        self._masks = CausalMasks()
        self._block_masks: dict[int | None, BlockMask] = {}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Segments:
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Segments:
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Segments:
        other = object.__new__(Segments)
        other.__dict__.update(self.__dict__, _masks=CausalMasks(), _block_masks={})
        other.cu_q, other.cu_k = change(self.cu_q), change(self.cu_k)
        other.key_index = None if self.key_index is None else change(self.key_index)
        return other

    def mask(self, queries: int, keys: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[queries, keys], 0 where a segment's query attends and -inf elsewhere; made once for all layers."""
        return self._masks.of(queries, keys, window, dtype, device)

    def block_mask(self, window: int | None, device: torch.device) -> BlockMask:
        """The same for the whole row, for FlexAttention."""
        if window not in self._block_masks:
            mod = self.mask_mod(window, device)
            length = self.length
            self._block_masks[window] = create_block_mask(mod, None, None, length, length, device=str(device))
        return self._block_masks[window]

    def mask_mod(self, window: int | None, device: torch.device) -> Callable[..., Tensor]:
        """FlexAttention's ``mask_mod(b, h, q, kv)``: whether token ``q`` of the row attends to token ``kv``."""
        counts = torch.tensor([size for sizes in self._subtree_ends for size, _ in sizes], device=device)
        ends = torch.tensor([end for sizes in self._subtree_ends for _, end in sizes], device=device)
        subtree_end = ends.repeat_interleave(counts)
        before = torch.tensor([s.depth - s.begin for s in self.bounds], device=device)
        depth = torch.arange(self.length, device=device) + before.repeat_interleave(
            torch.tensor(self.query_sizes, device=device)
        )

        def attends(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            below = (kv <= q) & (q < subtree_end[kv])
            # What lies between an ancestor and its descendant belongs to others, and is no distance.
            return below if window is None else below & (depth[q] - depth[kv] < window)

        return attends


class CausalMasks:
    """Causal masks, each made once for all layers."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, int, int | None, torch.dtype], Tensor] = {}

    def of(self, queries: int, keys: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        """As :func:`causal_mask`."""
        name = (queries, keys, window, dtype)
        if name not in self._made:
            self._made[name] = causal_mask(queries, keys, window, dtype, device)
        return self._made[name]


def causal_mask(queries: int, keys: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[queries, keys], 0 where a query attends and -inf elsewhere; the last query is at the last key."""
    # How many keys lie between; below 0 is the future.
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
    return torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)


def _subtree_ends(segments: Sequence[Segment]) -> list[list[Range]]:
    """For each segment, its tokens in runs (how many, where what hangs on them ends): tokens [t, end) see token t.

    ValueError where that is not so for some end.
    """
    begins = {s.begin: i for i, s in enumerate(segments)}
    # Where the beginning of a segment stops that is the last ancestor of others -> where the last of these ends.
    ends: list[dict[int, int]] = [{s.end: s.end} for s in segments]
    seen = 0
    for s in segments:
        own = s.end - s.begin
        seen += own * s.depth + own * (own + 1) // 2
        for i, (begin, end) in enumerate(s.ancestors):
            parent = begins.get(begin)
            if parent is None or not (
                begin < end <= segments[parent].end <= s.begin and segments[parent].ancestors == s.ancestors[:i]
            ):
                raise ValueError(f"{s} should have ancestors that other segments before it begin with")
            ends[parent][end] = max(s.end, ends[parent].get(end, 0))
    runs: list[list[Range]] = []
    for s, of_one in zip(segments, ends, strict=True):
        of_one = dict(sorted(of_one.items()))
        stops = [s.begin, *of_one]
        last = list(accumulate(reversed(of_one.values()), max))[::-1]
        runs.append([(b - a, end) for a, b, end in zip(stops, stops[1:], last, strict=False)])
    position = 0
    for size, end in (run for of_one in runs for run in of_one):
        # Its tokens see themselves and what follows, up to the end.
        seen -= size * (end - position) - size * (size - 1) // 2
        position += size
    if seen:
        raise ValueError("segments should stand depth first: what hangs on a token before anything that does not")
    return runs
