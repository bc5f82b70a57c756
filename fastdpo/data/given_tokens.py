"""Tokenised rows that somebody hands over: whether what they say of their answers can be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import datasets

from fastdpo.data.columns import check_references, with_weights
from fastdpo.data.comparisons import LEAST_WEIGHT, MOST_WEIGHT
from fastdpo.data.terms import GROUP_COLUMNS, GROUP_TOKEN_COLUMNS, WEIGHT_COLUMN, DataError


def check_tokens(tokenised: datasets.Dataset) -> None:
    """
    Args:
        tokenised: rows of token ids, of pairs or of groups.

    Raises:
        DataError: pairs name answers that are not there, or one twice; weights, ranks, masks or the reference's
            log-probabilities are not as many as what they are of, or are none. The message names the row.
    """
    if not set(GROUP_TOKEN_COLUMNS) <= set(tokenised.column_names):
        if 0 in (with_weights(tokenised)[WEIGHT_COLUMN] if WEIGHT_COLUMN in tokenised.column_names else ()):
            raise DataError("a row has the weight 0; leave such rows out.")
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


def _wrong_in(row: dict[str, Any]) -> str:
    """What a group says that cannot be; empty for nothing."""
    answers, pairs = row["completion_ids"], row["pairs"]
    count = len(answers)
    if not pairs:
        return "pairs: there are none."
    for pair in pairs:
        if len(pair) != 2 or not all(0 <= i < count for i in pair) or pair[0] == pair[1]:
            return f"pairs: {list(pair)} should be two of {count} answers, chosen and rejected, counted from 0."
    for name, of in (("pair_weights", len(pairs)), ("completion_mask", count), ("ranks", count), (_REFERENCES, count)):
        if row.get(name) and len(row[name]) != of:
            return f"{name}: it has {len(row[name])} entries; it should have {of}."
    for weight in row.get("pair_weights") or ():
        if not LEAST_WEIGHT <= weight <= MOST_WEIGHT:
            return f"pair_weights: {weight:g} should be from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}."
    for mask, ids in zip(row.get("completion_mask") or (), answers, strict=False):
        if mask and len(mask) != len(ids):
            return f"completion_mask: it has {len(mask)} numbers for an answer of {len(ids)} tokens."
    return _wrong_numbers("ranks", row) or _wrong_numbers(_REFERENCES, row)


def _wrong_numbers(name: str, row: dict[str, Any]) -> str:
    numbers: Sequence[float] = row.get(name) or ()
    if not all(math.isfinite(number) for number in numbers):
        return f"{name}: {list(numbers)} should be finite numbers."
    if name == "ranks" and len(set(numbers)) < len(numbers):
        return f"ranks: {list(numbers)} should differ; none at all where two answers are as good."
    return ""


_REFERENCES = GROUP_COLUMNS[-1]
