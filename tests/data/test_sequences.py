from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from token_trees import batches, pairs_in

from fastdpo.data import PreferenceCollator
from fastdpo.data.sequences import Cut, TokenSequence, sequences_of, together

WHOLE = Cut()


def sides_of(pair: dict) -> list[TokenSequence]:
    return sequences_of(pair, WHOLE).sequences


@given(batches(), st.booleans())
def test_pairs_are_those_of_the_rows_in_order(rows, distinct):
    found = together([sequences_of(row, WHOLE) for row in rows], distinct=distinct)
    expected = [(i, pair) for i, row in enumerate(rows) for pair in pairs_in(row)]
    assert found.pair_rows == [i for i, _ in expected]
    assert found.weights == [pair.get("weight", 1.0) for _, pair in expected]
    for (chosen, rejected), (_, pair) in zip(found.pairs, expected, strict=True):
        assert [found.sequences[chosen], found.sequences[rejected]] == sides_of(pair)
    # No sequence is in none, and none is there twice.
    assert {i for pair in found.pairs for i in pair} == set(range(len(found.sequences)))
    if distinct:
        assert all(s not in found.sequences[:i] for i, s in enumerate(found.sequences))
    in_order = [i for pair in found.pairs for i in pair]
    if all("completion_ids" not in row for row in rows):
        assert list(dict.fromkeys(in_order)) == list(range(len(found.sequences)))


@given(batches(max_rows=1), st.integers(2, 12), st.sampled_from(["keep_start", "keep_end"]))
def test_sequences_are_cut_as_in_padded_batches(rows, max_length, truncation_mode):
    collate = PreferenceCollator(0, max_length, truncation_mode)
    for pair in pairs_in(rows[0]):
        try:
            batch = collate([pair])
        except ValueError as error:
            with pytest.raises(ValueError, match="no completion left") as ours:
                sequences_of(pair, Cut(max_length, truncation_mode))
            assert str(ours.value) == str(error)
            continue
        try:
            found = sequences_of(pair, Cut(max_length, truncation_mode)).sequences
        except ValueError:  # what is left has no predecessor: padded batches find nothing to score, and say nothing
            assert not batch["completion_mask"][:, 1:].any(1).all()
            continue
        for side, sequence in enumerate(found):
            inside = batch["attention_mask"][side].bool()
            assert batch["input_ids"][side][inside].tolist() == sequence.ids
            mask = sequence.mask or [1] * (len(sequence.ids) - sequence.begin)
            assert batch["completion_mask"][side][inside].tolist() == [0] * sequence.begin + mask
            assert sequence.scored == batch["completion_mask"][side][1:].sum()


def test_a_group_looks_like_this():
    row = {
        "prompt_ids": [1, 2],
        "completion_ids": [[3], [4, 5], [3], [6], [7]],
        "pairs": [[1, 0], [3, 2], [1, 2]],
        "pair_weights": [0.5, 1.0, 2.0],
        "ref_completion_logps": [-1.0, -2.0, -3.0, -4.0, -5.0],
    }
    found = sequences_of(row, WHOLE)
    # The last is in no pair, and the third is the first.
    assert [s.ids for s in found.sequences] == [[1, 2, 3], [1, 2, 4, 5], [1, 2, 6]]
    assert found.pairs == [(1, 0), (2, 0), (1, 0)]
    assert found.references == [(-2.0, -1.0), (-4.0, -3.0), (-2.0, -3.0)]
    assert (found.tokens, found.rankings) == (10, [])
    found = sequences_of(row | {"ranks": [4, 0, 3, 2, 1]}, WHOLE)
    assert [s.ids[2:] for s in found.sequences] == [[3], [4, 5], [6], [7]]
    assert found.rankings == [[1, 3, 2, 0, 0]]
    assert found.ranked_references == [[-2.0, -5.0, -4.0, -3.0, -1.0]]


def test_a_completion_of_one_token_needs_a_prompt():
    with pytest.raises(ValueError, match="no completion left"):
        sequences_of({"prompt_ids": [], "chosen_ids": [1, 2], "rejected_ids": [3]}, WHOLE)
