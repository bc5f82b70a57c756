"""Tokenised rows that somebody hands over: whether what they say of their answers can be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastdpo.data.columns import check_references, with_weights
from fastdpo.data.comparisons import LEAST_WEIGHT, MOST_WEIGHT
from fastdpo.data.row_digests import MASK_COLUMNS
from fastdpo.data.terms import GROUP_COLUMNS, GROUP_TOKEN_COLUMNS, TOKEN_COLUMNS, WEIGHT_COLUMN, DataError


def check_tokens(tokenised: datasets.Dataset) -> None:
    """
    Args:
        tokenised: rows of token ids, of pairs or of groups.

    Raises:
        DataError: an answer has no tokens, or a null among them; pairs name answers that are not there, or one twice;
            weights, ranks, masks or the reference's log-probabilities are not as many as what they are of, or are none;
            a mask scores nothing; ranks contradict pairs. The message names the row.
    """
    if not set(GROUP_TOKEN_COLUMNS) <= set(tokenised.column_names):
        if 0 in (with_weights(tokenised)[WEIGHT_COLUMN] if WEIGHT_COLUMN in tokenised.column_names else ()):
            raise DataError("a row has the weight 0; leave such rows out.")
        _check_pairs(tokenised)
        check_references(tokenised)
        return
    names = [name for name in (*GROUP_TOKEN_COLUMNS, *GROUP_COLUMNS) if name in tokenised.column_names]
    number = 0
    for batch in tokenised.select_columns(names).with_format(None).iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            wrong = _wrong_in(dict(zip(batch, values, strict=True)))
            if wrong:
                raise DataError(f"row {number}, {wrong}")
            number += 1


def _check_pairs(tokenised: datasets.Dataset) -> None:
    names = [name for name in (*TOKEN_COLUMNS, *MASK_COLUMNS) if name in tokenised.column_names]
    start = 0
    # By columns: a run may hand over millions of pairs.
    for table in tokenised.select_columns(names).with_format("arrow").iter(batch_size=1000):
        for name in names:
            column = table.column(name).combine_chunks()
            lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy()
            if name in MASK_COLUMNS:
                ids = table.column(name.replace("_mask", "_ids")).combine_chunks()
                wrong, what = _wrong_masks(column, lengths, pc.list_value_length(ids).to_numpy())
            else:
                wrong, what = lengths < (0 if name == "prompt_ids" else 1), "it has no tokens."
                wrong |= _of_rows(column, pc.is_null(column.flatten()), len(wrong))
            if wrong.any():
                raise DataError(f"row {start + int(np.flatnonzero(wrong)[0])}, {name}: {what}")
        start += table.num_rows


def _wrong_masks(masks: pa.ListArray, lengths: np.ndarray, of: np.ndarray) -> tuple[np.ndarray, str]:
    """Which masks cannot be those of so many tokens, and why."""
    wrong = (lengths > 0) & (lengths != of)
    if wrong.any():
        return wrong, "it should have a number for each token, or none at all."
    values = masks.flatten().cast(pa.int64())  # booleans, too, and nothing at all
    wrong = _of_rows(masks, pc.invert(pc.is_in(values, pa.array([0, 1]))), len(of))
    if wrong.any():
        return wrong, "it should be of 0 and 1."
    return (lengths > 0) & ~_of_rows(masks, pc.equal(values, 1), len(of)), "it scores no token."


def _of_rows(lists: pa.ListArray, is_so: pa.BooleanArray, count: int) -> np.ndarray:
    """bool [count]: which lists have an entry of which it is so."""
    found = np.zeros(count, bool)
    found[pc.list_parent_indices(lists).to_numpy()[is_so.to_numpy(zero_copy_only=False)]] = True
    return found


def _wrong_in(row: dict[str, Any]) -> str:
    """What a group says that cannot be; empty for nothing."""
    answers, pairs = row["completion_ids"], row["pairs"]
    if row["prompt_ids"] is None or None in row["prompt_ids"]:
        return "prompt_ids: it has no tokens."
    if not answers or any(not ids or None in ids for ids in answers):
        return "completion_ids: an answer has no tokens."
    count = len(answers)
    if not pairs:
        return "pairs: there are none."
    for pair in pairs:
        if len(pair or ()) != 2 or not all(i is not None and 0 <= i < count for i in pair) or pair[0] == pair[1]:
            return f"pairs: {pair} should be two of {count} answers, chosen and rejected, counted from 0."
    for name, of in (("pair_weights", len(pairs)), ("completion_mask", count), ("ranks", count), (_REFERENCES, count)):
        if row.get(name) and len(row[name]) != of:
            return f"{name}: it has {len(row[name])} entries; it should have {of}."
    for weight in row.get("pair_weights") or ():
        if weight is None or not LEAST_WEIGHT <= weight <= MOST_WEIGHT:
            words = "null" if weight is None else f"{weight:g}"
            return f"pair_weights: {words} should be from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}."
    for mask, ids in zip(row.get("completion_mask") or (), answers, strict=False):
        if mask and len(mask) != len(ids):
            return f"completion_mask: it has {len(mask)} numbers for an answer of {len(ids)} tokens."
        if mask and (not {0, 1}.issuperset(mask) or 1 not in mask):
            return f"completion_mask: {mask} should be of 0 and 1, and score a token."
    return _wrong_numbers("ranks", row) or _wrong_numbers(_REFERENCES, row) or _contradiction(row)


def _wrong_numbers(name: str, row: dict[str, Any]) -> str:
    numbers: Sequence[float | None] = row.get(name) or ()
    if not all(number is not None and math.isfinite(number) for number in numbers):
        return f"{name}: {list(numbers)} should be finite numbers."
    if name == "ranks" and len(set(numbers)) < len(numbers):
        return f"ranks: {list(numbers)} should differ; none at all where two answers are as good."
    return ""


def _contradiction(row: dict[str, Any]) -> str:
    ranks: Sequence[float] = row.get("ranks") or ()
    for chosen, rejected in row["pairs"] if ranks else ():
        if ranks[chosen] > ranks[rejected]:
            return f"ranks: {ranks} put answer {rejected} before {chosen}, and a pair prefers {chosen}."
    return ""


_REFERENCES = GROUP_COLUMNS[-1]
