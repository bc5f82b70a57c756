"""Who attends to whom, told segment by segment."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpo.model.segments import Segments


def dense(segments: Segments, window: int | None) -> Tensor:
    """[N, N] bool, segment by segment: a query attends to its keys up to itself, counted from its own end."""
    allowed = torch.zeros(segments.length, segments.length, dtype=torch.bool)
    for begin, end, prefix_begin, prefix_end in segments.bounds:
        keys = [*range(prefix_begin, prefix_end), *range(begin, end)]
        for q in range(begin, end):
            seen = keys[: keys.index(q) + 1]
            allowed[q, seen if window is None else seen[-window:]] = True
    return allowed
