"""Groups with answers of which max_length leaves nothing that is scored: these go, and their pairs with them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value
from toy_data import assistant, make_tokenizer, user

from fastdpo.data import prepare
from fastdpo.data.collator import PreferenceCollator
from fastdpo.data.group_account import account_groups
from fastdpo.data.group_limits import BEYOND, _late
from fastdpo.data.truncation import cut

pytestmark = pytest.mark.usefixtures("quiet_and_uncached")

TOKENIZER = make_tokenizer()
TURNS = [[assistant("One."), user("More."), assistant(word)] for word in ("Two.", "Three.", "Four.")]
# What is scored of it comes late.
LATE = [assistant("One."), user("Go on, and say it as slowly as ever you can, for I write."), assistant("Five.")]


def token_groups(count: int, seed: int) -> list[dict[str, Any]]:
    """Random groups, neighbours in their order compared and some others; each token is another one."""
    rng = np.random.default_rng(seed)
    rows, token = [], iter(range(10**6))
    for _ in range(count):
        answers = int(rng.integers(2, 6))
        ids = [[next(token) for _ in range(rng.integers(2, 12))] for _ in range(answers)]
        late = [int(rng.integers(0, len(own))) if rng.random() < 0.5 else 0 for own in ids]
        masks = [[0] * first + [1] * (len(own) - first) if first else [] for own, first in zip(ids, late, strict=True)]
        order = rng.permutation(answers).tolist()
        better = [(a, b) for a in range(answers) for b in range(answers) if order[a] < order[b]]
        pairs = [[a, b] for a, b in better if order[b] - order[a] == 1 or rng.random() < 0.5]
        rows.append(
            {
                "prompt_ids": [next(token) for _ in range(rng.integers(1, 9))],
                "completion_ids": ids,
                "completion_mask": masks if any(masks) else [],
                "pairs": pairs,
                "pair_weights": rng.random(len(pairs)).tolist(),
                "ranks": list(map(float, order)) if rng.random() < 0.5 else [],
                "drop": "",
                "warn": [],
                "left_out": [],
            }
        )
    return rows


def as_dataset(rows: list[dict[str, Any]]) -> Dataset:
    ids, numbers = List(Value("int32")), List(Value("float64"))
    lists = {"prompt_ids": ids, "completion_ids": List(ids), "completion_mask": List(ids), "pairs": List(ids)}
    said = {"drop": Value("string"), "warn": List(Value("string")), "left_out": List(Value("string"))}
    return Dataset.from_list(rows, features=Features(lists | {"pair_weights": numbers, "ranks": numbers} | said))


def compared(row: dict[str, Any], answers: set[int]) -> dict[tuple[tuple[int, ...], tuple[int, ...]], float]:
    """The pairs among some answers, by their tokens, and what they count."""
    names = [tuple(ids) for ids in row["completion_ids"]]
    said = zip(row["pairs"], row["pair_weights"], strict=True)
    return {(names[a], names[b]): weight for (a, b), weight in said if {a, b} <= answers}


@pytest.mark.parametrize("limit", [3, 7, 12])
def test_as_cutting_says(limit: int) -> None:
    rows = token_groups(150, seed=limit)
    found, kept, summary = account_groups(as_dataset(rows), limit, "keep_start", 2)
    left_out, partly = 0, 0
    for number, row in enumerate(rows):
        masks = row["completion_mask"] or [[]] * len(row["completion_ids"])
        cuts = [
            cut(row["prompt_ids"], ids, limit, "keep_start", mask)
            for ids, mask in zip(row["completion_ids"], masks, strict=True)
        ]
        there = {i for i, (_, mask) in enumerate(cuts) if any(mask)}
        expected = compared(row, there)
        assert (number in kept) == bool(expected)
        if not expected:
            assert found[number] == row
            continue
        got = found[number]
        assert compared(got, set(range(len(got["completion_ids"])))) == expected
        assert {tuple(ids) for ids in got["completion_ids"]} == {side for pair in expected for side in pair}
        ours = got["completion_mask"] or [[]] * len(got["completion_ids"])
        said = {tuple(ids): mask for ids, mask in zip(row["completion_ids"], masks, strict=True)}
        assert ours == [said[tuple(ids)] for ids in got["completion_ids"]]
        if row["ranks"]:
            rank = {tuple(ids): rank for ids, rank in zip(row["completion_ids"], row["ranks"], strict=True)}
            order = sorted(rank[tuple(ids)] for ids in got["completion_ids"])
            assert got["ranks"] == [order.index(rank[tuple(ids)]) for ids in got["completion_ids"]]
        lost = len(row["pairs"]) - len(expected)
        left_out, partly = left_out + lost, partly + bool(lost)
        assert got["left_out"] == [BEYOND] * lost
        PreferenceCollator(0, limit)([got])  # which refuses an answer of which nothing is scored
    assert partly and len(kept) < len(rows)
    assert summary.groups.left_out == {BEYOND: left_out} and summary.groups.answers == sum(
        len(found[int(row)]["completion_ids"]) for row in kept
    )
    assert summary.dropped == {"prompt_too_long": len(rows) - len(kept)}


def test_one_answer_scored_beyond_the_limit_takes_its_pairs_alone() -> None:
    row = {"prompt": [user("Count.")], "completions": [*TURNS, LATE]}
    said = {"pairs": [[3, 0], [0, 1], [3, 1], [2, 1]], "weights": [1, 2, 3, 4]}
    (whole,), _ = prepare(Dataset.from_list([row | said]), TOKENIZER, score="last")
    limit = len(whole["prompt_ids"]) + whole["completion_mask"][3].index(1)
    rows = [row | said, row | {"pairs": [[3, 0], [2, 3]], "weights": [1, 1]}]
    kept, summary = prepare(Dataset.from_list(rows), TOKENIZER, score="last", max_length=limit)
    assert kept.to_list() == [
        whole
        | {
            "completion_ids": whole["completion_ids"][:3],
            "completion_mask": whole["completion_mask"][:3],
            "pairs": [[0, 1], [2, 1]],
            "pair_weights": [2.0, 4.0],
        }
        | ({"ranks": []} if "ranks" in kept.column_names else {})
    ]
    assert summary.dropped == {"prompt_too_long": 1} and summary.first_rows["prompt_too_long"] == [1]
    assert summary.groups.left_out == {BEYOND: 2}
    assert summary.lengths["answer"].max == len(whole["completion_ids"][3])  # by which one chooses max_length
    again, summary = prepare(Dataset.from_list(rows), TOKENIZER, score="last", max_length=limit + 1)
    assert len(again) == 2 and summary.groups.left_out == {}
    # The other end is the one that is scored.
    again, summary = prepare(
        Dataset.from_list(rows), TOKENIZER, score="last", max_length=limit, truncation_mode="keep_end"
    )
    assert len(again) == 2 and summary.groups.left_out == {}


def test_masks_without_a_scored_token_are_no_matter_of_the_limit() -> None:
    assert _late([[0, 0], [], [0, 1], [1]], 3, 4) == {2}
    assert _late([[1, 0], [0, 0, 1]], 0, 2) == {1}  # without a prompt the first token is not scored
