"""The micro-batches that need most memory, of a dataset's rows or of rows of a given length."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset

from fastdpo.data.collator import PreferenceCollator
from fastdpo.model.padded_parts import ACCELERATOR_FORWARD_COST, FORWARD_COST
from fastdpo.model.row_collator import RowCollator
from fastdpo.model.scoring import model_inputs

Row = dict[str, Any]


def made_up_rows(prompt: int, completion: int, count: int, vocabulary: int) -> list[Row]:
    """Pairs of these lengths in tokens, that have nothing in common but each pair its prompt.

    Raises:
        ValueError: a length is below 1.
    """
    if min(prompt, completion) < 1:
        raise ValueError(f"a pair of {prompt} + {completion} tokens; both should be at least 1")
    rng = random.Random(0)

    def tokens(size: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(size)]

    names = {"prompt_ids": prompt, "chosen_ids": completion, "rejected_ids": completion}
    return [{name: tokens(size) for name, size in names.items()} for _ in range(count)]


def longest_rows(rows: Dataset, count: int, max_length: int | None) -> list[Row]:
    """The rows of a prepared dataset whose sequences have most tokens together, the longest first."""
    prompts = _sizes(rows, "prompt_ids")
    if "completion_ids" in rows.column_names:
        sides = [np.array([sum(map(len, of_row)) for of_row in rows["completion_ids"]])]
    else:
        sides = [_sizes(rows, name) for name in ("chosen_ids", "rejected_ids")]
    limit = np.iinfo(np.int64).max if max_length is None else max_length
    tokens = sum(np.minimum(prompts + side, limit) for side in sides)
    order = np.argsort(-np.asarray(tokens), kind="stable")[:count]
    return [rows[int(i)] for i in order]


def _sizes(rows: Dataset, name: str) -> np.ndarray:
    parts = [
        pc.list_value_length(table.column(0)).to_numpy()
        for table in rows.select_columns([name]).with_format("arrow").iter(batch_size=10_000)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def make_collator(
    layout: str,
    device: str,
    *,
    max_tokens: int | None,
    max_length: int | None,
    truncation_mode: str,
    multiple: int | None,
) -> RowCollator:
    """What a run in this layout makes its batches with."""
    return RowCollator(
        layout,
        PreferenceCollator(
            pad_token_id=0, max_length=max_length, truncation_mode=truncation_mode, pad_to_multiple_of=multiple
        ),
        max_tokens,
        forward_cost=FORWARD_COST.get(device, ACCELERATOR_FORWARD_COST) if layout == "padded" else None,
    )


def tokens_of(part: dict[str, Any]) -> int:
    """The tokens that go through the model, padding included."""
    return sum(ids.numel() for ids in model_inputs({"micro_batches": [part]}))


def budget_of(part: dict[str, Any]) -> int:
    """The least ``max_tokens`` with which these rows are one micro-batch; a padded one is counted as wide as it is."""
    ids = part["row"].input_ids if "row" in part else part["input_ids"]
    return int(ids.numel())


def largest_part(collator: RowCollator, rows: Sequence[Row]) -> tuple[dict[str, Any], int]:
    """Of the micro-batches that the rows are taken in: the one of most tokens, and how many there are."""
    parts = collator(list(rows))["micro_batches"]
    return max(parts, key=tokens_of), len(parts)
