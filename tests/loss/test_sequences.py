"""Where sequences' tokens are, and sums over them, against plain loops; both layouts, with holes."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastdpo.loss.sequences import Sequences

IGNORE = -7


@st.composite
def rows_of_targets(draw: st.DrawFn) -> list[list[int]]:
    """2B rows of targets, each with one at least that is scored."""
    pairs = draw(st.integers(1, 4))
    target = st.sampled_from([IGNORE, 3, 4])
    row = st.tuples(st.lists(target, max_size=5), st.lists(target, max_size=5)).map(lambda x: [*x[0], 5, *x[1]])
    return draw(st.lists(row, min_size=2 * pairs, max_size=2 * pairs))


def padded(rows: list[list[int]]) -> Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [IGNORE] * (length - len(row)) for row in rows])


def bounds(rows: list[list[int]], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor([0, *map(len, rows)]).cumsum(0).to(dtype)


def make(rows: list[list[int]], *, packed: bool, at_shorter: bool, look: bool = True) -> tuple[Sequences, Tensor]:
    targets = torch.tensor(sum(rows, [])) if packed else padded(rows)
    sequences = Sequences(targets, bounds(rows) if packed else None, IGNORE, at_shorter=at_shorter, look=look)
    return sequences, targets


@given(rows=rows_of_targets(), packed=st.booleans(), at_shorter=st.booleans(), look=st.booleans(), seed=st.integers(0))
def test_lengths_and_sums(rows: list[list[int]], packed: bool, at_shorter: bool, look: bool, seed: int) -> None:
    sequences, targets = make(rows, packed=packed, at_shorter=at_shorter, look=look)
    pairs = len(rows) // 2
    counts = [sum(y != IGNORE for y in row) for row in rows]
    assert sequences.tokens.tolist() == counts
    assert sequences.counts == (counts if look else None)
    values = torch.randn(targets.shape, generator=torch.Generator().manual_seed(seed % 2**31))
    values = values.where(targets != IGNORE, 0)
    by_row = values.split([len(row) for row in rows]) if packed else values.unbind()
    segments, lengths = [], []
    for i, row in enumerate(by_row):
        shorter = min(counts[i], counts[(i + pairs) % len(rows)]) if at_shorter else counts[i]
        tokens = [x for x, y in zip(row.tolist(), rows[i], strict=False) if y != IGNORE]
        parts = [tokens[:shorter], tokens[shorter:]] if at_shorter else [tokens]
        segments.append([math.fsum(part) for part in parts])
        lengths.append([len(part) for part in parts])
    assert sequences.lengths.tolist() == lengths
    of_segments = sequences.segment_sums(values)
    assert of_segments.dtype == torch.float64
    torch.testing.assert_close(of_segments, torch.tensor(segments, dtype=torch.float64), rtol=1e-15, atol=1e-14)
    torch.testing.assert_close(sequences.sums(values), of_segments.sum(1), rtol=1e-15, atol=1e-14)
    flags = (values > 0).long()
    assert sequences.sums(values > 0).tolist() == [
        int(row.sum()) for row in (flags.split([len(row) for row in rows]) if packed else flags)
    ]


@given(rows=rows_of_targets(), packed=st.booleans(), at_shorter=st.booleans())
def test_sums_are_differentiable(rows: list[list[int]], packed: bool, at_shorter: bool) -> None:
    sequences, targets = make(rows, packed=packed, at_shorter=at_shorter)
    values = torch.zeros(targets.shape, requires_grad=True)
    sums = sequences.segment_sums(values)
    factors = torch.arange(1, sums.numel() + 1).view(sums.shape)
    (grad,) = torch.autograd.grad((sums * factors).sum(), values)
    # A token's slope is its segment's factor.
    torch.testing.assert_close(
        sequences.segment_sums(grad.where(targets != IGNORE, 0)), sequences.lengths * factors.double()
    )


def test_sums_hold_what_float32_would_round() -> None:
    values = torch.tensor([[-300.0] * 4, [2.0**-20] * 4])
    sequences = Sequences(torch.zeros(2, 4, dtype=torch.int64), None, IGNORE, at_shorter=False, look=True)
    assert sequences.sums(values).tolist() == [-1200.0, 2.0**-18]
    long = Sequences(torch.zeros(2, 10**5, dtype=torch.int64), None, IGNORE, at_shorter=False, look=True)
    terms = torch.full((2, 10**5), 0.1)
    torch.testing.assert_close(long.sums(terms), torch.full((2,), 1e5 * float(terms[0, 0]), dtype=torch.float64))


TARGETS = torch.zeros(10, dtype=torch.int64)
MISUSE = [
    (torch.zeros(3, 5), None, ValueError, "targets has shape (3, 5); it should be [2B, T], an even number of rows"),
    (torch.zeros(0, 5), None, ValueError, "targets has shape (0, 5); it should be [2B, T]"),
    (TARGETS, None, ValueError, "targets has shape (10,); it should be [2B, T]"),
    (
        TARGETS.view(2, 5),
        torch.tensor([0, 5, 10]),
        ValueError,
        "targets has shape (2, 5); with cu_seqlens it should be",
    ),
    (TARGETS, torch.tensor([0, 3, 10, 10]), ValueError, "cu_seqlens has shape (4,); it should be [2B + 1]"),
    (TARGETS, torch.tensor([0]), ValueError, "cu_seqlens has shape (1,)"),
    (TARGETS, torch.tensor([[0, 5, 10]]), ValueError, "cu_seqlens has shape (1, 3)"),
    (
        TARGETS,
        torch.tensor([0.0, 5.0, 10.0]),
        TypeError,
        "cu_seqlens has dtype torch.float32; it should be torch.int64",
    ),
    (TARGETS, torch.tensor([0, 5, 10], device="meta"), ValueError, "cu_seqlens is on meta, targets on cpu"),
    (TARGETS, torch.tensor([1, 5, 10]), ValueError, "cu_seqlens should rise from 0 to N = 10; it is [1, 5, 10]"),
    (TARGETS, torch.tensor([0, 11, 10]), ValueError, "cu_seqlens should rise from 0 to N = 10"),
    (TARGETS, torch.tensor([0, 5, 9]), ValueError, "cu_seqlens should rise from 0 to N = 10"),
    (TARGETS, torch.tensor([0, 10, 10]), ValueError, "every position is ignore_index (-7): rejected of pair 0; each"),
    (
        torch.full((4, 2), IGNORE),
        None,
        ValueError,
        "chosen of pair 0, chosen of pair 1, rejected of pair 0, rejected of",
    ),
    (torch.zeros(2, 0), None, ValueError, "chosen of pair 0, rejected of pair 0; each should score at least one token"),
    (torch.full((20, 2), IGNORE), None, ValueError, "chosen of pair 7, …; each should score"),
]


@pytest.mark.parametrize(("targets", "cu_seqlens", "error", "message"), MISUSE)
def test_misuse(targets: Tensor, cu_seqlens: Tensor | None, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        Sequences(targets, cu_seqlens, IGNORE, at_shorter=False, look=True)


def test_bounds_of_either_integer_dtype() -> None:
    rows = [[1, 2], [IGNORE, 3], [4], [5, 6, 7]]
    for dtype in (torch.int32, torch.int64):
        sequences = Sequences(torch.tensor(sum(rows, [])), bounds(rows, dtype), IGNORE, at_shorter=True, look=True)
        assert sequences.lengths.tolist() == [[1, 1], [1, 0], [1, 0], [1, 2]]
