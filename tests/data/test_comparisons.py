"""What a row says of its answers, in more ways than one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from toy_data import assistant, make_tokenizer, user, write_jsonl

from fastdpo.data import DataError, load_preferences, prepare, read_preferences

TOKENIZER = make_tokenizer()
ROW = {"prompt": "Which way is north?", "completions": ["Where the moss grows.", "Ask someone.", "Up."]}


def made(rows: list[dict[str, Any]], **how: Any) -> Any:
    return prepare(datasets.Dataset.from_list(rows), TOKENIZER, **how)


@pytest.mark.parametrize("said", [{"scores": [1, 5, 3]}, {"ranks": [3, 1, 2]}])
def test_pairs_against_scores_count_and_are_doubtful(said: dict[str, Any]) -> None:
    """And the row is no ranking: metrics and losses of rankings would go the other way than the pairs."""
    against = ROW | said | {"pairs": [[0, 1], [2, 0]]}
    rows, summary = made([against, ROW | said | {"prompt": "And south?", "pairs": [[1, 0], [1, 2]]}])
    assert rows["pairs"] == [[[0, 1], [2, 0]], [[1, 0], [1, 2]]]
    assert rows["ranks"] == [[], [2.0, 0.0, 1.0]]
    assert summary.warned == {"scores_disagree": 1} and summary.first_rows["scores_disagree"] == [0]
    with pytest.raises(DataError, match="strict: 1 of 1 rows .row 0.: one of its pairs prefers an answer that"):
        made([against], strict=True)
    with pytest.raises(DataError, match="row 0: one of its pairs prefers an answer that does not score higher"):
        made([against], weight_by_score=True)


def test_equal_scores_of_a_pair_say_nothing_against_it() -> None:
    rows, summary = made([ROW | {"scores": [1, 1, 0], "pairs": [[0, 1]]}])
    assert not summary.warned and rows["ranks"] == [[0.0, 1.0]]


@pytest.mark.parametrize(
    ("prompt", "completions"),
    [
        (ROW["prompt"], ROW["completions"]),
        ([user(ROW["prompt"])], [[assistant(answer)] for answer in ROW["completions"]]),
        ([{"role": "system", "content": "Be kind."}, user(ROW["prompt"])], ROW["completions"]),
    ],
)
def test_a_message_to_the_system(prompt: Any, completions: Any, tmp_path: Path) -> None:
    """Beside answers as beside a pair."""
    row = {"prompt": prompt, "completions": completions, "scores": [3, 2, 1], "system": "Be kind."}
    pair = {"prompt": [user(ROW["prompt"])], "system": "Be kind."}
    pair |= {"chosen": [assistant(ROW["completions"][0])], "rejected": [assistant(ROW["completions"][1])]}
    (wanted,), _ = made([pair])
    for rows in (load_preferences(str(write_jsonl(tmp_path / "a.jsonl", [row]))), datasets.Dataset.from_list([row])):
        (group,), summary = prepare(rows, TOKENIZER)
        assert group["prompt_ids"] == wanted["prompt_ids"] and not summary.unused_columns
        assert group["completion_ids"][:2] == [wanted["chosen_ids"], wanted["rejected_ids"]]


def test_a_pair_beside_answers_is_a_guess() -> None:
    row = ROW | {"scores": [3, 2, 1], "chosen": "Up.", "rejected": "Down."}
    with pytest.raises(DataError, match="row 0: it has 'completions' beside 'chosen' and 'rejected'"):
        made([row])
    kept, _ = made([row | {"chosen": None, "rejected": None}])  # as a table has them beside other rows that are pairs
    assert len(kept) == 1


def test_answers_that_are_a_text(tmp_path: Path) -> None:
    """A table has no lists; it is said that this is what is wrong, and not the columns."""
    path = tmp_path / "answers.csv"
    datasets.Dataset.from_list([ROW | {"scores": [3, 2, 1]}]).to_csv(path)
    with pytest.raises(
        DataError, match=re.escape("answers to a prompt whose 'completions' are a string, and should be")
    ):
        load_preferences(str(path))
    with pytest.raises(DataError, match="'completions' should be a list of answers, found a string"):
        read_preferences(datasets.Dataset.from_csv(str(path)), format="completions")
