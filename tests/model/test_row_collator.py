from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from token_trees import batches, pairs_in, texts

from fastdpo.data import PreferenceCollator
from fastdpo.data.sequences import Cut, sequences_of, together
from fastdpo.model.packing import LAYOUTS, pack
from fastdpo.model.row_collator import RowCollator, split_packed, split_padded, split_shared

COUNTS = st.lists(st.integers(1, 100), min_size=1, max_size=20)


@given(COUNTS, st.integers(1, 300))
def test_rows_are_split_within_the_budget(tokens, budget):
    split = split_packed(tokens, budget)
    assert sorted(i for row in split for i in row) == list(range(len(tokens)))
    assert all(len(row) == 1 or sum(tokens[i] for i in row) <= budget for row in split)
    assert all(row == sorted(row) for row in split)
    # First-fit leaves at most one row less than half full.
    assert sum(sum(tokens[i] for i in row) <= budget // 2 for row in split) <= 1


@given(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 100)), min_size=1, max_size=20), st.integers(1, 1000))
def test_rows_are_split_into_padded_batches_within_the_budget(sizes, budget):
    split = split_padded(sizes, budget)
    assert sorted(i for batch in split for i in batch) == list(range(len(sizes)))
    for batch in split:
        tokens = sum(sizes[i][0] for i in batch) * max(sizes[i][1] for i in batch)
        assert len(batch) == 1 or tokens <= budget


@given(st.lists(st.lists(texts(min_size=1), min_size=1, max_size=3), min_size=1, max_size=7), st.integers(1, 60))
def test_rows_that_share_are_split_within_the_budget(rows, budget):
    def tokens(indices: list[int]) -> int:
        return len({tuple(ids[:n]) for i in indices for ids in rows[i] for n in range(1, len(ids) + 1)})

    split = split_shared(rows, budget, least=1)
    assert sorted(i for row in split for i in row) == list(range(len(rows)))
    assert all(len(row) == 1 or tokens(row) <= budget for row in split)


def test_rows_that_share_belong_together():
    long = [list(range(i, i + 20)) for i in (100, 200)]
    rows = [[[*long[i % 2], i]] for i in range(6)]
    assert sorted(split_shared(rows, 24, least=4)) == [[0, 2, 4], [1, 3, 5]]


IDS = [([1, 2, 3], [4], [5, 6]), ([7], [8, 9, 10, 11, 12], [13]), ([1], [2], [3])]
ROWS = [
    {"prompt_ids": p, "chosen_ids": c, "rejected_ids": r, "ref_chosen_logps": -i, "ref_rejected_logps": i}
    for i, (p, c, r) in enumerate(IDS)
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batches_without_a_budget_are_one_part(layout):
    (part,) = RowCollator(layout, PreferenceCollator(0))(ROWS)["micro_batches"]
    assert part["rows"].tolist() == part["pair_rows"].tolist() == [0, 1, 2]
    assert part["pairs"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert part["ref_chosen_logps"].tolist() == [0, -1, -2]
    assert part["ref_chosen_logps"].dtype == torch.float64
    assert "pair_weights" not in part
    assert ("row" in part) == (layout != "padded")


@pytest.mark.parametrize(("layout", "sizes"), [("shared", [7, 7]), ("repeated", [9, 8, 4]), ("padded", [24, 4])])
def test_batches_with_a_budget_are_taken_in_parts(layout, sizes):
    budget = {"shared": 10, "repeated": 10, "padded": 24}[layout]
    collate = RowCollator(layout, PreferenceCollator(0), max_tokens=budget, least_shared=1)
    parts = collate(ROWS)["micro_batches"]
    found = sorted(p["row"].input_ids.numel() if "row" in p else p["input_ids"].numel() for p in parts)
    assert found == sorted(sizes)
    assert sorted(torch.cat([p["rows"] for p in parts]).tolist()) == [0, 1, 2]
    for part in parts:
        assert part["ref_rejected_logps"].tolist() == [ROWS[i]["ref_rejected_logps"] for i in part["rows"]]


@given(batches(max_rows=5), st.sampled_from(LAYOUTS), st.none() | st.integers(10, 60))
def test_parts_hold_the_pairs_of_their_rows(rows, layout, budget):
    parts = RowCollator(layout, PreferenceCollator(0), max_tokens=budget)(rows)["micro_batches"]
    assert sorted(torch.cat([p["rows"] for p in parts]).tolist()) == list(range(len(rows)))
    for part in parts:
        of_pairs = [(i, pair) for i in part["rows"].tolist() for pair in pairs_in(rows[i])]
        assert part["pair_rows"].tolist() == [i for i, _ in of_pairs]
        weights = [pair.get("weight", 1.0) for _, pair in of_pairs]
        ones = torch.ones(len(weights), dtype=torch.float64)
        assert part.get("pair_weights", ones).tolist() == weights
        batch = together([sequences_of(rows[i], Cut()) for i in part["rows"]], distinct=layout == "shared")
        assert part["pairs"].tolist() == list(map(list, batch.pairs))
        assert part["sequence_tokens"] == batch.tokens
        if layout == "padded":
            assert len(part["input_ids"]) == len(batch.sequences)
            scored = part["completion_mask"][:, 1:].sum(1)
        else:
            assert torch.equal(part["row"].input_ids, pack(batch.sequences, shared=layout == "shared").input_ids)
            scored = part["row"].cu_seqlens.diff()
        assert scored.tolist() == [s.scored for s in batch.sequences]
        assert part["pair_tokens"] == scored[part["pairs"]].sum()


def test_equal_completions_of_several_rows_are_one_where_prompts_are_shared():
    rows = [{"prompt_ids": [1, 2], "chosen_ids": c, "rejected_ids": r} for c, r in (([3], [4]), ([4], [5]), ([3], [5]))]
    (part,) = RowCollator("shared", PreferenceCollator(0))(rows)["micro_batches"]
    assert part["pairs"].tolist() == [[0, 1], [1, 2], [0, 2]]
    (part,) = RowCollator("repeated", PreferenceCollator(0))(rows)["micro_batches"]
    assert part["pairs"].tolist() == [[0, 1], [2, 3], [4, 5]]


def test_rankings_are_of_all_completions():
    group = {"prompt_ids": [1], "completion_ids": [[2], [3], [4]], "pairs": [[0, 2]], "ranks": [1.0, 3.0, 2.0]}
    group["ref_completion_logps"] = [-1.0, -2.0, -3.0]
    for layout in LAYOUTS:
        (part,) = RowCollator(layout, PreferenceCollator(0))([group, group])["micro_batches"]
        assert part["rankings"].tolist() == [[0, 2, 1], [0, 2, 1] if layout == "shared" else [3, 5, 4]]
        assert part["ranking_rows"].tolist() == part["rows"].tolist() == [0, 1]
        assert part["ref_ranked_logps"].tolist() == [[-1.0, -3.0, -2.0]] * 2
        assert part["ref_chosen_logps"].tolist() == [-1.0] * 2
        assert part["ref_rejected_logps"].tolist() == [-3.0] * 2
