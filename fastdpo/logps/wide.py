"""Numbers of which there are few, one a row or one a sequence: float64 where the device has that.

A CPU and CUDA do; Apple's GPUs and some of Intel's have none, and elsewhere it is slow: there they are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HAVE_FLOAT64 = ("cpu", "cuda", "meta")
_HAVE_SEGMENT_REDUCE = ("cpu", "cuda", "meta")


def wide_dtype(device: torch.device) -> torch.dtype:
    """What such numbers are kept in; where values are float64 themselves, that."""
    return torch.float64 if device.type in _HAVE_FLOAT64 else torch.float32


def widened(values: Tensor) -> Tensor:
    """In at least :func:`wide_dtype`."""
    return values.to(torch.promote_types(values.dtype, wide_dtype(values.device)))


def segment_sums(values: Tensor, offsets: Tensor) -> Tensor:
    """[n] sums of ``values`` [N], floats, over n segments with the bounds ``offsets`` [n + 1]: 0, …, N.

    Without atomics, so that results repeat.
    """
    if values.device.type in _HAVE_SEGMENT_REDUCE:
        return torch.segment_reduce(values, "sum", offsets=offsets, unsafe=True)
    places = torch.arange(len(values), device=values.device)
    inside = (places >= offsets[:-1].unsqueeze(1)) & (places < offsets[1:].unsqueeze(1))
    # Not a product of both: what lies outside of a segment may be infinite.
    return torch.where(inside, values, 0.0).sum(1)
