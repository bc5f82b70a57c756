"""Who attends to whom, told segment by segment."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdpo.model.segments import Segment, Segments


def keys_of(segment: Segment) -> list[int]:
    return [i for a, b in (*segment.ancestors, (segment.begin, segment.end)) for i in range(a, b)]


def dense(segments: Segments, window: int | None) -> Tensor:
    """[N, N] bool, segment by segment: a query attends to its keys up to itself, counted from its own end."""
    allowed = torch.zeros(segments.length, segments.length, dtype=torch.bool)
    for segment in segments.bounds:
        keys = keys_of(segment)
        for q in range(segment.begin, segment.end):
            seen = keys[: keys.index(q) + 1]
            allowed[q, seen if window is None else seen[-window:]] = True
    return allowed
