"""Of which file a row is, where rows of several are one dataset: looked up when an error has to say it.

A dataset may have been cut, shuffled and joined with others since; so the row is looked for in the files by what it
says. Nothing is kept with the rows for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import datasets

from fastdpo.data.terms import DataError

Row = dict[str, Any]
Origin = tuple[str, Callable[[], Iterator[Row]]]  # what messages call a file, and what reads its pairs

_origins: dict[str, list[Origin]] = {}  # by the file of the cache in which the rows are


def remember(dataset: datasets.Dataset, origins: Sequence[Origin]) -> None:
    """These are the files of the dataset's rows."""
    for file in dataset.cache_files:
        _origins[file["filename"]] = list(origins)


def origins_of(dataset: datasets.Dataset) -> list[Origin]:
    """The files of the dataset's rows, as far as they are known."""
    found = [origin for file in dataset.cache_files for origin in _origins.get(file["filename"], ())]
    return list({name: (name, read) for name, read in found}.values())


def place_of(dataset: datasets.Dataset, number: int) -> str:
    """``a.jsonl, pair 3`` for a row, counted from 0; "" where there is one file alone, or it is in none of them."""
    origins = origins_of(dataset)
    if len(origins) < 2:
        return ""
    row = _said(dataset[number])
    for name, read in origins:
        for pair, candidate in enumerate(read()):
            if _said(candidate) == row:
                return f"{name}, pair {pair}"
    return ""


def _said(row: Row) -> Row:
    return {name: value for name, value in row.items() if value is not None}


@contextmanager
def naming_files(dataset: datasets.Dataset) -> Iterator[None]:
    """Errors that begin with the number of a row say of which file it is, too."""
    try:
        yield
    except DataError as error:
        numbered = re.match(r"row (\d+)\b", str(error))
        place = place_of(dataset, int(numbered[1])) if numbered else ""
        if not place:
            raise
        raise DataError(f"{place}: {error}") from error
