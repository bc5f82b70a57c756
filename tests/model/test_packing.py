from __future__ import annotations

import pickle
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from token_trees import batches
from torch import Tensor

from fastdpo.data.sequences import Cut, TokenSequence, sequences_of, together
from fastdpo.model.packing import PackedRow, pack


def sequences_in(rows: list[dict[str, Any]]) -> list[TokenSequence]:
    return together([sequences_of(row, Cut()) for row in rows], distinct=True).sequences


def attended(row: PackedRow) -> Tensor:
    """[N, N] bool, which tokens each token attends to."""
    index = torch.arange(row.segments.length)
    return row.segments.mask_mod(None, torch.device("cpu"))(None, None, index[:, None], index[None])


def seen_by_all(row: PackedRow) -> list[list[int]]:
    """What each token sees, itself included, in the order of positions, which must have no gap and no double."""
    found = []
    for t, seen in enumerate(attended(row)):
        here = seen.nonzero().flatten()
        positions = row.position_ids[0, here]
        order = positions.argsort()
        assert positions[order].tolist() == list(range(len(here)))
        assert here[order][-1] == t
        found.append(row.input_ids[0, here[order]].tolist())
    return found


@given(batches(), st.booleans(), st.sampled_from([1, 4]))
def test_every_scored_token_is_predicted_from_the_sequence_before_it(batch, shared, least):
    sequences = sequences_in(batch)
    row = pack(sequences, shared=shared, least=least)
    seen = seen_by_all(row)
    predictors, targets = row.of_sequences(row.scored).tolist(), row.of_sequences(row.targets).tolist()
    bounds = row.cu_seqlens.tolist()
    assert len(bounds) == len(sequences) + 1
    assert len(row.scored) == len(row.targets)
    for (ids, begin, mask), start, stop in zip(sequences, bounds, bounds[1:], strict=False):
        # Without a prompt, the first token has nothing to be predicted from.
        scored = [t for t in range(max(begin, 1), len(ids)) if not mask or mask[t - begin]]
        assert targets[start:stop] == [ids[t] for t in scored]
        assert [seen[p] for p in predictors[start:stop]] == [ids[:t] for t in scored]


@given(batches())
def test_nothing_is_there_or_scored_twice(batch):
    sequences = sequences_in(batch)
    row = pack(sequences, shared=True, least=1)
    beginnings = {tuple(s.ids[:n]) for s in sequences for n in range(1, len(s.ids) + 1)}
    assert sorted(map(tuple, seen_by_all(row))) == sorted(beginnings)
    edges = list(zip(row.scored.tolist(), row.targets.tolist(), strict=True))
    assert len(set(edges)) == len(edges)
    named = range(len(edges)) if row.edge_index is None else row.edge_index.tolist()
    assert set(named) == set(range(len(edges)))


@given(batches())
def test_repeated_sequences_are_all_there(batch):
    sequences = sequences_in(batch)
    row = pack(sequences, shared=False)
    assert row.input_ids[0].tolist() == [i for s in sequences for i in s.ids]
    assert row.segments.key_index is None
    assert row.edge_index is None


def test_a_row_looks_like_this():
    ids = [[1, 2, 3, 4, 5], [1, 2, 3, 6], [7, 8], [7, 9, 10]]
    sequences = [TokenSequence(i, begin, []) for i, begin in zip(ids, (3, 3, 1, 1), strict=True)]
    row = pack(sequences, shared=True, least=1)
    # The longer completion follows its prompt.
    assert row.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 9, 10, 8]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2, 1]]
    assert row.scored.tolist() == [2, 3, 2, 6, 6, 7]  # the prompts' last positions twice
    assert row.targets.tolist() == [4, 5, 6, 8, 9, 10]
    assert row.edge_index is None
    assert row.cu_seqlens.tolist() == [0, 2, 3, 4, 6]
    assert row.segments.bounds == ((0, 5, ()), (5, 6, ((0, 3),)), (6, 9, ()), (9, 10, ((6, 7),)))
    # Completions that begin alike, and one that ends within another.
    sequences = [
        TokenSequence([1, 2, 3, 4], 1, []),
        TokenSequence([1, 2, 3], 1, []),
        TokenSequence([1, 2, 5], 1, [0, 1]),
    ]
    row = pack(sequences, shared=True, least=1)
    assert row.input_ids.tolist() == [[1, 2, 3, 4, 5]]
    assert row.scored.tolist() == [0, 1, 2, 1]
    assert row.targets.tolist() == [2, 3, 4, 5]
    assert row.edge_index.tolist() == [0, 1, 2, 0, 1, 3]
    assert row.cu_seqlens.tolist() == [0, 3, 5, 6]


def test_rows_survive_workers_and_devices():
    sequences = [TokenSequence(ids, 2, []) for ids in ([1, 2, 3], [1, 2, 4, 5], [1, 2, 3, 6])]
    row = pack(sequences, shared=True, least=1)
    for other in (pickle.loads(pickle.dumps(row)), row.to("cpu"), row.to("meta")):
        assert other.segments.bounds == row.segments.bounds
    moved = row.to("meta")
    tensors = (moved.input_ids, moved.scored, moved.edge_index, moved.cu_seqlens, moved.segments.key_index)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert row.segments.cu_k.device.type == "cpu"
