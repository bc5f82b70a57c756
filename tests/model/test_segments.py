from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from segment_masks import dense, keys_of

from fastdpo.model.segments import Segment, Segments

CPU = torch.device("cpu")


@st.composite
def rows(draw: st.DrawFn) -> Segments:
    """Segments that hang on one another at random, depth first."""
    segments: list[Segment] = []
    open_at: list[tuple[Segment, int]] = []  # on what the next may hang, and up to which token
    for length in draw(st.lists(st.integers(1, 6), min_size=1, max_size=8)):
        begin = segments[-1].end if segments else 0
        ancestors: tuple[tuple[int, int], ...] = ()
        level = draw(st.integers(0, len(open_at)))
        del open_at[level:]
        if open_at:
            parent, most = open_at.pop()
            end = draw(st.integers(parent.begin + 1, most))
            open_at.append((parent, end))
            ancestors = (*parent.ancestors, (parent.begin, end))
        segments.append(Segment(begin, begin + length, ancestors))
        open_at.append((segments[-1], begin + length))
    return Segments(segments)


@given(rows(), st.none() | st.integers(1, 8))
def test_masks_say_what_the_segments_say(segments, window):
    expected = dense(segments, window)
    index = torch.arange(segments.length)
    assert torch.equal(segments.mask_mod(window, CPU)(None, None, index[:, None], index[None]), expected)
    for segment in segments.bounds:
        keys = keys_of(segment)
        mask = segments.mask(segment.end - segment.begin, len(keys), window, torch.float64, CPU)
        assert torch.equal(mask == 0, expected[segment.begin : segment.end][:, keys])
        assert bool(((mask == 0) | (mask == -torch.inf)).all())


@given(rows())
def test_bounds_for_one_call_over_all_segments(segments):
    index = segments.key_index if segments.key_index is not None else torch.arange(segments.length)
    cu_q, cu_k = segments.cu_q.tolist(), segments.cu_k.tolist()
    assert segments.cu_q.dtype == segments.cu_k.dtype == torch.int32
    assert len(index) == cu_k[-1]
    for i, segment in enumerate(segments.bounds):
        assert (cu_q[i], cu_q[i + 1]) == (segment.begin, segment.end)
        assert index[cu_k[i] : cu_k[i + 1]].tolist() == keys_of(segment)
    assert segments.max_q == max(b - a for a, b in zip(cu_q, cu_q[1:], strict=False))
    assert segments.max_k == max(b - a for a, b in zip(cu_k, cu_k[1:], strict=False))


@given(rows())
def test_keys_are_whole_pieces(segments):
    pieces = torch.arange(segments.length).split(segments.piece_sizes)
    for segment, indices in zip(segments.bounds, segments.key_pieces, strict=True):
        assert torch.cat([pieces[i] for i in indices]).tolist() == keys_of(segment)
    queries = torch.arange(segments.length).split(segments.query_sizes)
    assert [(q[0], q[-1] + 1) for q in queries] == [(s.begin, s.end) for s in segments.bounds]


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([Segment(1, 3)], "should begin at 0"),
        ([Segment(0, 3), Segment(4, 5)], "should begin at 3"),
        ([Segment(0, 3), Segment(3, 3)], "should begin at 3"),
        ([Segment(0, 3), Segment(3, 5, ((2, 4),))], "other segments before it begin with"),
        ([Segment(0, 3), Segment(3, 5, ((0, 4),))], "other segments before it begin with"),
        ([Segment(0, 3), Segment(3, 5, ((0, 0),))], "other segments before it begin with"),
        ([Segment(0, 3), Segment(3, 5, ((0, 2),)), Segment(5, 6, ((3, 4),))], "other segments before it begin with"),
        ([Segment(0, 3), Segment(3, 5, ((0, 1),)), Segment(5, 6, ((0, 2),))], "depth first"),
        ([Segment(0, 3), Segment(3, 5), Segment(5, 6, ((0, 2),))], "depth first"),
    ],
    ids=["late", "gap", "empty", "within", "beyond", "nothing", "without its own", "higher first", "another between"],
)
def test_refuses_segments_that_do_not_make_a_row(segments, message):
    with pytest.raises(ValueError, match=message):
        Segments(segments)
