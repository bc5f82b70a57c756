"""The first rows of a stream, by which it is told what it has: it has to be read for them."""

from __future__ import annotations

from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

import datasets

from fastdpo.data.terms import DataError

# By which it is told what a stream has: its columns, and whether there are images.
LOOKED_AT = 16

_starts: WeakKeyDictionary[datasets.IterableDataset, tuple[int, list[dict[str, Any]]]] = WeakKeyDictionary()


def first_rows(rows: datasets.IterableDataset, count: int = LOOKED_AT) -> list[dict[str, Any]]:
    """The first ``count`` rows, or as many as there are; read once, and known to whoever asks later.

    A buffer that shuffles has to be filled for the first row, and a chunk of rows to be tokenised.
    """
    asked, found = _starts.get(rows, (0, []))
    if asked < count:
        asked = max(count, LOOKED_AT)
        found = list(islice(iter(rows), asked))
        _starts[rows] = asked, found
    return found[:count]


def columns_of_stream(rows: datasets.IterableDataset) -> list[str]:
    """The columns of the first row, which is read for it where nothing says them.

    Raises:
        DataError: there is no row.
    """
    if rows.column_names is not None:
        return list(rows.column_names)
    first = first_rows(rows, 1)
    if not first:
        raise DataError("The stream has no rows.")
    return list(first[0])
