"""The rows of one file, whatever its format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from fastdpo.data.reading.csv_rows import csv_rows
from fastdpo.data.reading.json_rows import json_rows
from fastdpo.data.reading.opening import DataFile, refuse_other_encodings
from fastdpo.data.reading.table_rows import arrow_rows, parquet_rows
from fastdpo.data.terms import DataError

_READERS: dict[str, Callable[[DataFile], Iterator[tuple[str, dict[str, Any]]]]] = {
    "jsonl": json_rows,
    "json": json_rows,
    "csv": csv_rows,
    "tsv": csv_rows,
    "parquet": parquet_rows,
    "arrow": arrow_rows,
}


def rows_of(file: DataFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of every row, in order; the place in words that follow the file's name.

    Raises:
        DataError: the file, or a row of it, cannot be read.
    """
    with file.reading():
        if file.path.stat().st_size == 0:
            raise DataError(f"{file.name} is empty (0 bytes).")
        if file.format not in ("parquet", "arrow"):
            refuse_other_encodings(file)
        yield from _READERS[file.format](file)
