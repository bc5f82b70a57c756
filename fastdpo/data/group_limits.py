"""Tokenised groups within ``max_length``: an answer of which it would leave nothing scored goes, with its pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from fastdpo.data.comparisons import ranks_or_order

BEYOND = "max_length ends before what is scored of one of its answers"
_REWRITTEN = ("completion_ids", "completion_mask", "pairs", "pair_weights", "ranks", "left_out")


def within_limit(
    tokenised: datasets.Dataset, stays: np.ndarray, max_length: int
) -> tuple[datasets.Dataset, np.ndarray]:
    """Groups of which the beginning is kept, without answers whose first scored token lies beyond it.

    Args:
        tokenised: all rows, with a group's columns and ``left_out``.
        stays: bool [rows], which of them nothing is to be said against before.
        max_length: most tokens of prompt and answer.

    Returns:
        The rows, those with no pair left as they were; and the numbers of these.
    """
    prompts = pc.list_value_length(tokenised.data.column("prompt_ids")).to_numpy()
    lost = stays & (prompts >= max_length)
    cut = False
    if "completion_mask" in tokenised.column_names:
        table = tokenised.select_columns(["completion_mask", "pairs"])
        for number in np.flatnonzero(stays & ~lost).tolist():
            row = table[number]
            late = _late(row["completion_mask"], int(prompts[number]), max_length)
            if late:
                lost[number] = not _pairs_without(late, row["pairs"])
                cut |= not lost[number]
    if cut:
        tokenised = tokenised.map(
            _rewrite,
            batched=True,
            fn_kwargs={"max_length": max_length},
            features=tokenised.features,
            desc="Leaving out answers beyond max_length",
        )
    return tokenised, np.flatnonzero(lost)


def _late(masks: Sequence[Sequence[int]], prompt: int, max_length: int) -> set[int]:
    """Which answers have scored tokens, and none among the first ``max_length``; without a prompt the first token is
    not scored."""
    start = int(prompt == 0)
    firsts = [prompt + (mask.index(1, start) if 1 in mask[start:] else 0) for mask in masks]
    return {i for i, first in enumerate(firsts) if first >= max_length}


def _pairs_without(answers: set[int], pairs: Sequence[Sequence[int]]) -> list[int]:
    """The places of the pairs of other answers."""
    return [place for place, pair in enumerate(pairs) if answers.isdisjoint(pair)]


def _rewrite(batch: dict[str, list[Any]], max_length: int) -> dict[str, list[Any]]:
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    rows = [_without_late(row, max_length) for row in rows]
    return {name: [row[name] for row in rows] for name in _REWRITTEN if name in batch}


def _without_late(row: dict[str, Any], max_length: int) -> dict[str, Any]:
    late = _late(row["completion_mask"], len(row["prompt_ids"]), max_length)
    left = _pairs_without(late, row["pairs"])
    if not late or not left:
        return row
    answers = sorted({i for place in left for i in row["pairs"][place]})
    pairs = [(answers.index(chosen), answers.index(rejected)) for chosen, rejected in (row["pairs"][i] for i in left)]
    scores = [-rank for rank in row["ranks"]] if row.get("ranks") else None
    masks = [row["completion_mask"][i] for i in answers]
    return row | {
        "completion_ids": [row["completion_ids"][i] for i in answers],
        "completion_mask": masks if any(masks) else [],
        "pairs": pairs,
        "pair_weights": [row["pair_weights"][place] for place in left] if row.get("pair_weights") else [],
        "ranks": ranks_or_order(scores, answers, pairs),
        "left_out": row["left_out"] + [BEYOND] * (len(row["pairs"]) - len(left)),
    }
