"""Which rows say again what one before them says."""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from hypothesis import given
from hypothesis import strategies as st

from fastdpo.data.account import repeated_rows
from fastdpo.data.row_digests import MASK_COLUMNS
from fastdpo.data.terms import TOKEN_COLUMNS

ids = st.sampled_from([[], [1], [2], [1, 2], [2, 1], [0], [0, 0]])
rows = st.lists(st.tuples(*[ids] * 3, *[st.sampled_from([[], [1, 0], [0, 1]])] * 2), max_size=12)


@given(rows=rows, masked=st.booleans(), seed=st.integers(0, 9))
def test_repeated_rows_are_found_as_by_hand(rows: list[tuple[Any, ...]], masked: bool, seed: int) -> None:
    names = (*TOKEN_COLUMNS, *MASK_COLUMNS) if masked else TOKEN_COLUMNS
    rows = [row[: len(names)] for row in rows]
    features = Features(dict.fromkeys(names, List(Value("int32"))))
    tokenised = Dataset.from_dict({name: [row[i] for row in rows] for i, name in enumerate(names)}, features)
    kept = np.flatnonzero(np.random.default_rng(seed).random(len(rows)) < 0.8)
    again, opposite, seen = [], [], []
    for number in kept.tolist():
        prompt, chosen, rejected, *masks = rows[number]
        if rows[number] in seen:
            again.append(number)
        elif (prompt, rejected, chosen, *masks[::-1]) in seen:
            opposite.append(number)
        seen.append(rows[number])
    found = repeated_rows(tokenised, kept)
    assert [each.tolist() for each in found] == [again, opposite]
