"""Tokenised rows as they are handed over: what they may not say of their answers."""

from __future__ import annotations

import re
from typing import Any

import pytest
from datasets import Dataset
from toy_data import make_tokenizer

from fastdpo.data.given_tokens import check_tokens
from fastdpo.data.preparing import prepare
from fastdpo.data.terms import DataError

GROUP = {"prompt_ids": [5, 6], "completion_ids": [[8, 9], [10, 11], [12]], "pairs": [[0, 1], [0, 2]]}
SAID = {
    "pair_weights": [1.0, 2.0],
    "ranks": [0.0, 1.0, 2.0],
    "completion_mask": [[0, 1], [], [1]],
    "ref_completion_logps": [-1.0, -2.0, -3.0],
}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"pairs": [[0, 3]]}, "pairs: [0, 3] should be two of 3 answers"),
        ({"pairs": [[0, -1]]}, "pairs: [0, -1] should be two"),
        ({"pairs": [[1, 1]]}, "pairs: [1, 1] should be two"),
        ({"pairs": [[0, 1, 2]]}, "pairs: [0, 1, 2] should be two"),
        ({"pairs": []}, "pairs: there are none."),
        ({"pair_weights": [1.0]}, "pair_weights: it has 1 entries; it should have 2."),
        ({"pair_weights": [-1.0, 1.0]}, "pair_weights: -1 should be from 1e-37 to 1e+37."),
        ({"pair_weights": [1.0, float("nan")]}, "pair_weights: nan should be"),
        ({"pair_weights": [0.0, 1.0]}, "pair_weights: 0 should be"),
        ({"ranks": [0.0, 1.0]}, "ranks: it has 2 entries; it should have 3."),
        ({"ranks": [0.0, 1.0, 1.0]}, "ranks: [0.0, 1.0, 1.0] should differ"),
        ({"ranks": [0.0, float("nan"), 1.0]}, "ranks: [0.0, nan, 1.0] should be finite"),
        ({"completion_mask": [[1], [], [1]]}, "completion_mask: it has 1 numbers for an answer of 2 tokens."),
        ({"ref_completion_logps": [-1.0]}, "ref_completion_logps: it has 1 entries; it should have 3."),
        ({"ref_completion_logps": [-1.0, None, 1.0]}, "ref_completion_logps: [-1.0, None, 1.0] should be finite"),
        ({"pairs": [[0, None]]}, "pairs: [0, None] should be two"),
        ({"pairs": [None]}, "pairs: None should be two"),
        ({"pairs": None}, "pairs: there are none."),
        ({"pair_weights": [None, 1.0]}, "pair_weights: null should be"),
        ({"ranks": [None, 1.0, 2.0]}, "ranks: [None, 1.0, 2.0] should be finite"),
        ({"ranks": [1.0, 0.0, 2.0]}, "ranks: [1.0, 0.0, 2.0] put answer 1 before 0, and a pair prefers 0."),
        ({"completion_mask": [[0, 2], [], [1]]}, "completion_mask: [0, 2] should be of 0 and 1"),
        ({"completion_mask": [[0, 0], [], [1]]}, "completion_mask: [0, 0] should be of 0 and 1, and score a token."),
        ({"completion_ids": [[8, 9], [], [12]]}, "completion_ids: an answer has no tokens."),
        ({"completion_ids": [[8, None], [10, 11], [12]]}, "completion_ids: an answer has no tokens."),
        ({"completion_ids": [None, [10, 11], [12]]}, "completion_ids: an answer has no tokens."),
        ({"completion_ids": None}, "completion_ids: an answer has no tokens."),
        ({"prompt_ids": None}, "prompt_ids: it has no tokens."),
        ({"prompt_ids": [None]}, "prompt_ids: it has no tokens."),
    ],
)
def test_groups(row: dict[str, Any], message: str) -> None:
    good = GROUP | SAID
    check_tokens(Dataset.from_list([GROUP]))
    check_tokens(Dataset.from_list([good, good | {"pair_weights": [], "ranks": [], "completion_mask": []}]))
    with pytest.raises(DataError, match=re.escape(f"row 1, {message}")):
        check_tokens(Dataset.from_list([good, good | row]))


def test_pairs() -> None:
    pair = {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]}
    check_tokens(Dataset.from_list([pair]))
    check_tokens(Dataset.from_list([pair | {"weight": 0.5}]))
    for weight, message in ((-1.0, "row 0, weight: it is -1.0"), (0.0, "weight 0"), (float("nan"), "it is nan")):
        with pytest.raises(DataError, match=message):
            check_tokens(Dataset.from_list([pair | {"weight": weight}]))


MASKED = {"prompt_ids": [5], "chosen_ids": [6, 7], "rejected_ids": [7], "chosen_mask": [0, 1], "rejected_mask": []}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen_ids": []}, "chosen_ids: it has no tokens."),
        ({"rejected_ids": None}, "rejected_ids: it has no tokens."),
        ({"chosen_ids": [6, None]}, "chosen_ids: it has no tokens."),
        ({"prompt_ids": None}, "prompt_ids: it has no tokens."),
        ({"chosen_mask": [1]}, "chosen_mask: it should have a number for each token"),
        ({"rejected_mask": [1, 1]}, "rejected_mask: it should have a number for each token"),
        ({"chosen_mask": [0, 2]}, "chosen_mask: it should be of 0 and 1."),
        ({"chosen_mask": [1, None]}, "chosen_mask: it should be of 0 and 1."),
        ({"chosen_mask": [0, 0]}, "chosen_mask: it scores no token."),
    ],
)
def test_answers_and_masks_of_pairs(row: dict[str, Any], message: str) -> None:
    rows = [MASKED, MASKED | {"prompt_ids": []}, MASKED | {"chosen_mask": None}]
    check_tokens(Dataset.from_list(rows))
    rows = Dataset.from_list([MASKED | row, *rows, MASKED | row]).select(
        [1, 2, 4]
    )  # as they are counted by who gave them
    with pytest.raises(DataError, match=re.escape(f"row 2, {message}")):
        check_tokens(rows)


PAIR = {"prompt": "Say:", "chosen": " yes", "rejected": " no"}
TOKENS = {"prompt_ids": [5], "chosen_ids": [6], "rejected_ids": [7]}


@pytest.mark.parametrize("row", [PAIR, TOKENS], ids=["text", "tokens"])
@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"ref_chosen_logps": -1.0, "ref_rejected_logps": None}, "row 1, ref_rejected_logps: it is null"),
        ({"ref_chosen_logps": "-1", "ref_rejected_logps": "-2"}, "column 'ref_chosen_logps' has type"),
        ({"ref_chosen_logps": -1.0}, "the rows have a column 'ref_chosen_logps' and none 'ref_rejected_logps'"),
    ],
)
def test_the_reference_in_columns(row: dict[str, Any], said: dict[str, Any], message: str) -> None:
    """What is not there is said before a batch is made of it."""
    good = row | dict.fromkeys(said, next(iter(said.values())))
    rows = Dataset.from_list([good, row | said])
    with pytest.raises(DataError, match=re.escape(message)):
        check_tokens(rows) if row is TOKENS else prepare(rows, make_tokenizer())


def test_a_reference_that_is_no_number_is_one_of_an_answer() -> None:
    """And not two, when pairs are joined: a run says on which row its loss is none."""
    rows = Dataset.from_list(
        [PAIR | {"ref_chosen_logps": float("nan"), "ref_rejected_logps": -float(i)} for i in (1, 1)]
    )
    groups, _ = prepare(rows, make_tokenizer(), group_by_prompt=True)
    assert [str(number) for number in groups[0]["ref_completion_logps"]] == ["nan", "-1.0"]
