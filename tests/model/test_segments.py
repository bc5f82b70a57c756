from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from segment_masks import dense

from fastdpo.model.segments import Segment, Segments

CPU = torch.device("cpu")


@st.composite
def rows(draw: st.DrawFn) -> Segments:
    segments: list[Segment] = []
    for length in draw(st.lists(st.integers(1, 6), min_size=1, max_size=6)):
        begin = segments[-1].end if segments else 0
        first = draw(st.integers(0, begin))
        last = draw(st.integers(first, begin))
        segments.append(Segment(begin, begin + length, first, last))
    return Segments(segments)


@given(rows(), st.none() | st.integers(1, 8))
def test_masks_say_what_the_segments_say(segments, window):
    expected = dense(segments, window)
    index = torch.arange(segments.length)
    assert torch.equal(segments.mask_mod(window, CPU)(None, None, index[:, None], index[None]), expected)
    for begin, end, prefix_begin, prefix_end in segments.bounds:
        keys = [*range(prefix_begin, prefix_end), *range(begin, end)]
        mask = segments.mask(end - begin, len(keys), window, torch.float64, CPU)
        assert torch.equal(mask == 0, expected[begin:end][:, keys])
        assert bool(((mask == 0) | (mask == -torch.inf)).all())


@given(rows())
def test_bounds_for_one_call_over_all_segments(segments):
    index = segments.key_index if segments.key_index is not None else torch.arange(segments.length)
    cu_q, cu_k = segments.cu_q.tolist(), segments.cu_k.tolist()
    assert segments.cu_q.dtype == segments.cu_k.dtype == torch.int32
    assert len(index) == cu_k[-1]
    for i, (begin, end, prefix_begin, prefix_end) in enumerate(segments.bounds):
        assert (cu_q[i], cu_q[i + 1]) == (begin, end)
        assert index[cu_k[i] : cu_k[i + 1]].tolist() == [*range(prefix_begin, prefix_end), *range(begin, end)]
    assert segments.max_q == max(b - a for a, b in zip(cu_q, cu_q[1:], strict=False))
    assert segments.max_k == max(b - a for a, b in zip(cu_k, cu_k[1:], strict=False))


@given(rows())
def test_keys_are_whole_pieces(segments):
    pieces = torch.arange(segments.length).split(segments.piece_sizes)
    for (begin, end, prefix_begin, prefix_end), indices in zip(segments.bounds, segments.key_pieces, strict=True):
        keys = torch.cat([pieces[i] for i in indices])
        assert keys.tolist() == [*range(prefix_begin, prefix_end), *range(begin, end)]
    queries = torch.arange(segments.length).split(segments.query_sizes)
    assert [(q[0], q[-1] + 1) for q in queries] == [(s.begin, s.end) for s in segments.bounds]


@pytest.mark.parametrize(
    "segments",
    [
        [Segment(1, 3, 0, 0)],
        [Segment(0, 3, 0, 0), Segment(4, 5, 0, 0)],
        [Segment(0, 3, 0, 0), Segment(3, 3, 0, 0)],
        [Segment(0, 3, 0, 0), Segment(3, 5, 2, 4)],
        [Segment(0, 3, 0, 0), Segment(3, 5, 2, 1)],
    ],
    ids=["late", "gap", "empty", "prefix within", "prefix backwards"],
)
def test_refuses_segments_that_do_not_make_a_row(segments):
    with pytest.raises(ValueError, match="should begin at"):
        Segments(segments)
