"""A reference cache of something else is refused, and what differs is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from ref_builds import Stop, builder, damage, failing_after, logps, never, token_rows

from fastdpo.ref_cache import RefCacheError
from fastdpo.ref_cache.files import COMPLETIONS

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "00" * 32}, r"the weights differ \(abababababab there, 000000000000 here\)"),
        ({"config": {"model_type": "llama", "rope_theta": 5e5}}, "the model's rope_theta was 10000.0 and is 500000.0"),
        ({"weights_dtype": "bfloat16"}, "weights_dtype was 'float32' and is 'bfloat16'"),
        ({"compute_dtype": "float32"}, "compute_dtype was 'bfloat16' and is 'float32'"),
        ({"tokenizer": "00" * 32}, "the tokenizer differs"),
        ({"chat_template": "00" * 32}, "the chat template differs"),
        ({"chat_template": None}, "the chat template differs"),
        ({"max_length": 256}, "max_length was 512 and is 256"),
        ({"max_length": None}, "max_length was 512 and is None"),
        ({"truncation_mode": "keep_end"}, "truncation_mode was 'keep_start' and is 'keep_end'"),
        ({"masking": "mine.Collator"}, "masking was 'fastdpo.data.PreferenceCollator' and is 'mine.Collator'"),
        ({"max_length": 1, "weights": "00" * 32}, "the weights differ .*; max_length was 512 and is 1"),
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_what_differs_is_named(change: dict[str, Any], message: str, complete: bool, tmp_path: Path) -> None:
    if complete:
        builder(tmp_path).with_columns(token_rows(), "train", 3)
    else:
        with pytest.raises(Stop):
            builder(tmp_path, failing_after(1)).with_columns(token_rows(), "train", 3)
    with pytest.raises(RefCacheError, match=rf"model: toy\): {message}\.\nDelete .* or name another folder"):
        builder(tmp_path, never, **change).with_columns(token_rows(), "train", 3)


def test_another_day_in_the_chat_template_is_named(tmp_path: Path) -> None:
    one, other = (f"{'ef' * 32}, on 2026-03-0{day}" for day in (1, 2))
    builder(tmp_path, chat_template=one).with_columns(token_rows(), "train", 3)
    said = r"the chat template writes the date, which was 2026-03-01 and is 2026-03-02 \(--template_date 2026-03-01 "
    with pytest.raises(RefCacheError, match=said):
        builder(tmp_path, never, chat_template=other).with_columns(token_rows(), "train", 3)
    builder(tmp_path, never, chat_template=one).with_columns(token_rows(), "train", 3)


def changed(rows: list[dict[str, Any]], *which: int) -> list[dict[str, Any]]:
    return [row | {"rejected_ids": [9]} if i in which else row for i, row in enumerate(rows)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: changed(rows, 7),
            r"toy\): a completion of kept row 7 \(the one with prompt \[1, 2, 3\]\) is not there\.",
        ),
        (lambda rows: changed(rows, 2, 7, 8), r"a completion of kept row 2 \(.*\) is not there, and [12] more"),
        (lambda rows: rows[:-1], "22 completions there, 20 here, 2 there are not here"),
        (lambda rows: [*rows, *changed(rows, 0)[:1]], "22 completions there, 23 here, a completion of kept row 11"),
        # A token that changes sides changes the mask, and no concatenation.
        (
            lambda rows: [{**rows[0], "prompt_ids": [1, 3], "chosen_ids": []}, *rows[1:]],
            "a completion of kept row 0",
        ),
    ],
)
def test_a_changed_row_is_named(change: Callable[[list], list], message: str, tmp_path: Path) -> None:
    built = builder(tmp_path)
    built.with_columns(token_rows(), "train", 3)
    again = builder(tmp_path, never)
    again.describe_row = lambda row: f"the one with prompt {row['prompt_ids']}"
    with pytest.raises(RefCacheError, match=message):
        again.with_columns(Dataset.from_list(change(token_rows().to_list())), "train", 3)


def test_without_a_sound_list_of_rows_the_counts_are_told(tmp_path: Path) -> None:
    builder(tmp_path).with_columns(token_rows(), "train", 3)
    damage(tmp_path / "train" / COMPLETIONS, "torn")
    with pytest.raises(RefCacheError, match=r"the completions differ \(22 there, 20 here\)"):
        builder(tmp_path, never).with_columns(token_rows(10), "train", 3)


def test_rows_that_came_tokenised_are_judged_by_their_ids(tmp_path: Path) -> None:
    built = builder(tmp_path).with_columns(token_rows(), "train", 3)
    again = builder(tmp_path, never, tokenizer=None, chat_template=None)
    assert logps(again.with_columns(token_rows(), "train", 3)) == logps(built)
    # And an unfinished one goes on.
    with pytest.raises(Stop):
        builder(tmp_path / "b", failing_after(2)).with_columns(token_rows(), "train", 3)
    again = builder(tmp_path / "b", tokenizer=None, chat_template=None)
    assert logps(again.with_columns(token_rows(), "train", 3)) == logps(built)
    assert again.splits["train"].rows_read == 6


def test_keys_of_another_transformers_version_do_not_count(tmp_path: Path) -> None:
    builder(tmp_path).with_columns(token_rows(), "train", 3)
    newer = {"model_type": "llama", "rope_theta": 10000.0, "something_new": 3}
    builder(tmp_path, never, config=newer).with_columns(token_rows(), "train", 3)
