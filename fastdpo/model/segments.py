"""What attends to what in a packed row.

A row's queries are cut into segments. A segment's queries attend to their own segment causally, and before that to all
of a prefix: the prompt that another segment of the row begins with. So ``[prompt | chosen | rejected]`` is two
segments, ``[prompt | chosen]`` and ``[rejected]`` with the prompt as its prefix, and a plain sequence is one without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


class Segment(NamedTuple):
    """Queries [begin, end) of a row; their keys are [prefix_begin, prefix_end) and then their own, causally."""

    begin: int
    end: int
    prefix_begin: int
    prefix_end: int


class Segments:
    """What each token of a row attends to.

    Args:
        segments: none empty, one after another from 0 to the row's end.

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
        ValueError: the segments leave a gap, or a prefix does not come before its segment.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.bounds = tuple(segments)
        ends = [0, *(s.end for s in self.bounds)]
        for s, previous_end in zip(self.bounds, ends, strict=False):
            if s.begin != previous_end or s.end <= s.begin or not s.prefix_begin <= s.prefix_end <= s.begin:
                raise ValueError(f"{s} should begin at {previous_end}, hold a token, and have its prefix before it")
        self.length = ends[-1]
        prefixes = [s.prefix_end - s.prefix_begin for s in self.bounds]
        keys = [s.end - s.begin + prefix for s, prefix in zip(self.bounds, prefixes, strict=True)]
        self.query_sizes = [s.end - s.begin for s in self.bounds]
        cuts = sorted({0, *(cut for s in self.bounds for cut in s)})
        self.piece_sizes = [b - a for a, b in zip(cuts, cuts[1:], strict=False)]
        piece_at = {cut: i for i, cut in enumerate(cuts)}
        self.key_pieces = [
            [*range(piece_at[s.prefix_begin], piece_at[s.prefix_end]), *range(piece_at[s.begin], piece_at[s.end])]
            for s in self.bounds
        ]
        self.max_q = max(self.query_sizes)
        self.max_k = max(keys)
        self.cu_q = torch.tensor(ends, dtype=torch.int32)
        self.cu_k = torch.tensor([0, *accumulate(keys)], dtype=torch.int32)
        self.key_index = None
        if any(prefixes):
            ranges = [r for s in self.bounds for r in ((s.prefix_begin, s.prefix_end), (s.begin, s.end))]
            self.key_index = torch.cat([torch.arange(*r) for r in ranges])
        self._masks: dict[tuple[int, int, int | None, torch.dtype], Tensor] = {}
        self._block_masks: dict[int | None, BlockMask] = {}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Segments:
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Segments:
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Segments:
        other = object.__new__(Segments)
        other.__dict__.update(self.__dict__, _masks={}, _block_masks={})
        other.cu_q, other.cu_k = change(self.cu_q), change(self.cu_k)
        other.key_index = None if self.key_index is None else change(self.key_index)
        return other

    def mask(self, queries: int, keys: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[queries, keys], 0 where a segment's query attends and -inf elsewhere; made once for all layers."""
        name = (queries, keys, window, dtype)
        if name not in self._masks:
            # How many keys lie between; below 0 is the future.
            distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            self._masks[name] = torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
        return self._masks[name]

    def block_mask(self, window: int | None, device: torch.device) -> BlockMask:
        """The same for the whole row, for FlexAttention."""
        if window not in self._block_masks:
            mod = self.mask_mod(window, device)
            length = self.length
            self._block_masks[window] = create_block_mask(mod, None, None, length, length, device=str(device))
        return self._block_masks[window]

    def mask_mod(self, window: int | None, device: torch.device) -> Callable[..., Tensor]:
        """FlexAttention's ``mask_mod(b, h, q, kv)``: whether token ``q`` of the row attends to token ``kv``."""
        counts = torch.tensor([s.end - s.begin for s in self.bounds], device=device)
        begin, prefix_begin, prefix_end = (
            torch.tensor([getattr(s, name) for s in self.bounds], device=device).repeat_interleave(counts)
            for name in ("begin", "prefix_begin", "prefix_end")
        )

        def attends(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            own = (kv >= begin[q]) & (kv <= q)
            prefix = (kv >= prefix_begin[q]) & (kv < prefix_end[q])
            if window is None:
                return own | prefix
            # What lies between a prefix and its segment belongs to others, and is no distance.
            return (own & (q - kv < window)) | (prefix & (q - begin[q] + prefix_end[q] - kv < window))

        return attends
