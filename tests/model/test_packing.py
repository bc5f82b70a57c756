from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastdpo.data import PreferenceCollator
from fastdpo.model.packing import PackedRow, Pair, RowCollator, cut_pair, pack, split_packed, split_padded

TOKENS = st.integers(0, 50)


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    """As prepare makes them: where there is no prompt, a completion has two tokens at least."""
    prompt = draw(st.lists(TOKENS, max_size=6))
    completion = st.lists(TOKENS, min_size=1 if prompt else 2, max_size=6)
    return {"prompt_ids": prompt, "chosen_ids": draw(completion), "rejected_ids": draw(completion)}


def sequences(pairs: list[Pair]) -> list[tuple[list[int], list[int]]]:
    """(context, completion), chosen ones first."""
    return [(p.chosen_context, p.chosen) for p in pairs] + [(p.rejected_context, p.rejected) for p in pairs]


def attended(row: PackedRow) -> Tensor:
    """[N, N] bool, which tokens each token attends to."""
    index = torch.arange(row.segments.length)
    return row.segments.mask_mod(None, torch.device("cpu"))(None, None, index[:, None], index[None])


def seen_by(row: PackedRow, t: int) -> list[int]:
    """What token ``t`` sees, itself included, in the order of positions, which must have no gap and no double."""
    seen = attended(row)[t].nonzero().flatten()
    positions = row.position_ids[0, seen]
    order = positions.argsort()
    assert positions[order].tolist() == list(range(len(seen)))
    assert seen[order][-1] == t
    return row.input_ids[0, seen[order]].tolist()


# --------------------------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------------------------


@given(st.lists(rows(), min_size=1, max_size=4), st.booleans())
def test_every_scored_position_sees_the_sequence_up_to_its_target(batch, shared):
    pairs = [cut_pair(row, None, "keep_start") for row in batch]
    row = pack(pairs, shared=shared)
    bounds = row.cu_seqlens.tolist()
    assert row.pairs == len(pairs)
    assert len(row.scored) == len(row.targets) == bounds[-1]
    for (context, completion), begin, end in zip(sequences(pairs), bounds, bounds[1:], strict=False):
        whole = context + completion
        # Without a prompt, the first token has nothing to be predicted from.
        first = max(len(context), 1)
        assert row.targets[begin:end].tolist() == whole[first:]
        for t, length in zip(row.scored[begin:end].tolist(), range(first, len(whole)), strict=True):
            assert seen_by(row, t) == whole[:length]


@given(st.lists(rows(), min_size=1, max_size=4), st.booleans())
def test_every_token_of_a_row_belongs_to_a_sequence(batch, shared):
    pairs = [cut_pair(row, None, "keep_start") for row in batch]
    row = pack(pairs, shared=shared)
    beginnings = {tuple((c + y)[:n]) for c, y in sequences(pairs) for n in range(1, len(c + y) + 1)}
    assert all(tuple(seen_by(row, t)) in beginnings for t in range(row.segments.length))


@given(st.lists(rows(), min_size=1, max_size=4))
def test_rows_have_no_padding_and_each_prompt_once(batch):
    pairs = [cut_pair(row, None, "keep_start") for row in batch]
    lengths = [[len(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")] for row in batch]
    for shared, prompts in ((True, 1), (False, 2)):
        row = pack(pairs, shared=shared)
        tokens = sum(prompts * p + c + r for p, c, r in lengths)
        assert row.input_ids.shape == row.position_ids.shape == (1, tokens)
        assert row.segments.length == tokens == sum(pair.row_tokens(shared) for pair in pairs)
        assert row.sequence_tokens == sum(2 * p + c + r for p, c, r in lengths)


def test_a_row_looks_like_this():
    pairs = [Pair([1, 2, 3], [4, 5], [1, 2, 3], [6]), Pair([7], [8], [7], [9, 10])]
    row = pack(pairs, shared=True)
    assert row.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 1, 2]]
    assert row.scored.tolist() == [2, 3, 6, 2, 6, 8]  # the prompts' last positions twice
    assert row.targets.tolist() == [4, 5, 8, 6, 9, 10]
    assert row.cu_seqlens.tolist() == [0, 2, 3, 4, 6]
    assert row.segments.bounds == ((0, 5, 0, 0), (5, 6, 0, 3), (6, 8, 0, 0), (8, 10, 6, 7))
    row = pack(pairs, shared=False)
    assert row.input_ids.tolist() == [[1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8, 7, 9, 10]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 0, 1, 2]]
    assert row.segments.key_index is None


def test_prompts_that_were_cut_apart_are_not_shared():
    row = {"prompt_ids": [1, 2, 3, 4], "chosen_ids": [5], "rejected_ids": [6, 7, 8]}
    pair = cut_pair(row, 4, "keep_end")
    assert pair == Pair([2, 3, 4], [5], [4], [6, 7, 8])
    assert not pair.has_one_prompt
    packed = pack([pair], shared=True)
    assert packed.input_ids.tolist() == [[2, 3, 4, 5, 4, 6, 7, 8]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]


@given(rows(), st.integers(2, 10), st.sampled_from(["keep_start", "keep_end"]))
def test_sequences_are_cut_as_in_padded_batches(row, max_length, truncation_mode):
    try:
        batch = PreferenceCollator(0, max_length, truncation_mode)([row])
    except ValueError as error:
        with pytest.raises(ValueError, match="no completion left") as ours:
            cut_pair(row, max_length, truncation_mode)
        assert str(ours.value) == str(error)
        return
    pair = cut_pair(row, max_length, truncation_mode)
    for side, (context, completion) in enumerate(sequences([pair])):
        inside = batch["attention_mask"][side].bool()
        assert batch["input_ids"][side][inside].tolist() == context + completion
        assert batch["completion_mask"][side][inside].tolist() == [0] * len(context) + [1] * len(completion)


def test_a_completion_of_one_token_needs_a_prompt():
    with pytest.raises(ValueError, match="no completion left"):
        cut_pair({"prompt_ids": [], "chosen_ids": [1, 2], "rejected_ids": [3]}, None, "keep_start")


def test_rows_survive_workers_and_devices():
    row = pack([Pair([1, 2], [3], [1, 2], [4, 5])], shared=True)
    for other in (pickle.loads(pickle.dumps(row)), row.to("cpu"), row.to("meta")):
        assert other.segments.bounds == row.segments.bounds
        assert other.sequence_tokens == row.sequence_tokens == 7
    moved = row.to("meta")
    tensors = (moved.input_ids, moved.scored, moved.cu_seqlens, moved.segments.cu_k, moved.segments.key_index)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert row.segments.cu_k.device.type == "cpu"


# --------------------------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------------------------

COUNTS = st.lists(st.integers(1, 100), min_size=1, max_size=20)


@given(COUNTS, st.integers(1, 300))
def test_pairs_are_split_into_rows_within_the_budget(tokens, budget):
    split = split_packed(tokens, budget)
    assert sorted(i for row in split for i in row) == list(range(len(tokens)))
    assert all(len(row) == 1 or sum(tokens[i] for i in row) <= budget for row in split)
    assert all(row == sorted(row) for row in split)
    # First-fit leaves at most one row less than half full.
    assert sum(sum(tokens[i] for i in row) <= budget // 2 for row in split) <= 1


@given(COUNTS, st.integers(1, 1000))
def test_pairs_are_split_into_padded_batches_within_the_budget(widths, budget):
    split = split_padded(widths, budget)
    assert sorted(i for batch in split for i in batch) == list(range(len(widths)))
    assert all(len(batch) == 1 or 2 * len(batch) * max(widths[i] for i in batch) <= budget for batch in split)


IDS = [([1, 2, 3], [4], [5, 6]), ([7], [8, 9, 10, 11, 12], [13]), ([1], [2], [3])]
ROWS = [
    {"prompt_ids": p, "chosen_ids": c, "rejected_ids": r, "ref_chosen_logps": -i, "ref_rejected_logps": i}
    for i, (p, c, r) in enumerate(IDS)
]


@pytest.mark.parametrize("layout", ["shared", "repeated", "padded"])
def test_batches_without_a_budget_are_one_part(layout):
    (part,) = RowCollator(layout, PreferenceCollator(0))(ROWS)["micro_batches"]
    assert part["pairs"].tolist() == [0, 1, 2]
    assert part["ref_chosen_logps"].tolist() == [0, -1, -2]
    assert part["ref_chosen_logps"].dtype == torch.float64
    assert ("row" in part) == (layout != "padded")


@pytest.mark.parametrize(("layout", "sizes"), [("shared", [10, 6]), ("repeated", [9, 8, 4]), ("padded", [24, 4])])
def test_batches_with_a_budget_are_taken_in_parts(layout, sizes):
    budget = {"shared": 10, "repeated": 10, "padded": 24}[layout]
    parts = RowCollator(layout, PreferenceCollator(0), max_tokens=budget)(ROWS)["micro_batches"]
    found = sorted(p["row"].input_ids.numel() if "row" in p else p["input_ids"].numel() for p in parts)
    assert found == sorted(sizes)
    assert sorted(torch.cat([p["pairs"] for p in parts]).tolist()) == [0, 1, 2]
    for part in parts:
        assert part["ref_rejected_logps"].tolist() == [ROWS[i]["ref_rejected_logps"] for i in part["pairs"]]
        if "row" in part:
            pairs = [cut_pair(ROWS[i], None, "keep_start") for i in part["pairs"]]
            assert torch.equal(part["row"].input_ids, pack(pairs, shared=layout == "shared").input_ids)
