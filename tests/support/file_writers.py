"""Rows of Python objects → files of every format, as people's programs write them; and what such a file can say."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

Rows = list[dict[str, Any]]


def as_lines(rows: Rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


# Text of JSON, by the names of files. They say all that JSON has.
JSON_FILES: dict[str, Callable[[Rows], bytes]] = {
    "pairs.jsonl": as_lines,
    "escaped.jsonl": lambda rows: "\n".join(map(json.dumps, rows)).encode(),
    "pairs.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "pairs.jsonl.gz": lambda rows: gzip.compress(as_lines(rows)),
    "pairs.ndjson.bz2": lambda rows: bz2.compress(as_lines(rows)),
    "pairs.json.xz": lambda rows: lzma.compress(json.dumps(rows).encode()),
    "pairs.jsonl.zst": lambda rows: pa.compress(as_lines(rows), codec="zstd", asbytes=True),
}


# --------------------------------------------------------------------------------------------------------------------
# Text in cells
# --------------------------------------------------------------------------------------------------------------------


def numpy_text(messages: list[dict[str, Any]]) -> str:
    return str(_array(messages))


def _array(messages: list[dict[str, Any]]) -> np.ndarray:
    return np.array([*messages, None], dtype=object)[:-1]


# What programs write into a cell that should hold messages.
MESSAGE_WRITERS: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "json": json.dumps,
    "python": repr,
    "numpy": numpy_text,
    "numpy repr": lambda messages: repr(_array(messages)),
}


def _write_cells(path: Path, rows: Rows, write: Callable[[list[dict[str, Any]]], str]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    plain = path.name.removesuffix(".gz")
    opened = gzip.open if plain != path.name else open
    with opened(path, "wt", newline="", encoding="utf-8") as file:
        out = csv.writer(file, delimiter="\t" if plain.endswith(".tsv") else ",")
        out.writerow(names)
        for row in rows:
            out.writerow([_cell(row.get(name), name, write) for name in names])


def _cell(value: Any, name: str, write: Callable[[list[dict[str, Any]]], str]) -> str:
    if name == "tools":
        return "" if value is None else json.dumps(value)
    return value if isinstance(value, str) else write(value)


# --------------------------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------------------------


def table_of(rows: Rows, text: pa.DataType | None = None) -> pa.Table:
    """The rows as Arrow infers their types; with all strings of the type ``text``, if it is given."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: pa.array([row.get(name) for row in rows]) for name in names}
    if text is not None:
        columns = {name: pa.array(array.to_pylist(), _spelled(array.type, text)) for name, array in columns.items()}
    return pa.table(columns)


def _spelled(kind: pa.DataType, text: pa.DataType) -> pa.DataType:
    if pa.types.is_string(kind):
        return text
    if pa.types.is_list(kind):
        return pa.list_(_spelled(kind.value_type, text))
    return pa.struct([(f.name, _spelled(f.type, text)) for f in kind]) if pa.types.is_struct(kind) else kind


def write_table(path: Path, table: pa.Table) -> None:
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        make = pa.ipc.new_stream if "stream" in path.name else pa.ipc.new_file
        with make(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)


def said(value: Any) -> Any:
    """By hand: without what structs fill in."""
    if isinstance(value, dict):
        return {key: said(item) for key, item in value.items() if item is not None}
    return [said(item) for item in value] if isinstance(value, list) else value


def sayable(rows: Rows) -> tuple[Rows, Rows]:
    """Rows that one table has room for, as many as come first, and what it says of them: keys in the order of structs.

    A table has one type for a column, no empty struct, no integer beyond 64 bits, and no null in a struct that is not
    an absent key.
    """
    found: Rows = []
    back: Rows = []
    for row in rows:
        try:
            table = table_of([*found, row])
            again = [said(each) for each in table.to_pylist()]
        except (pa.ArrowException, OverflowError):
            continue
        if _typed(again) == _typed([*map(said, found), said(row)]):
            found, back = [*found, row], again
    return found, back


def _typed(rows: Rows) -> str:
    """Text that tells 1 from 1.0, and not keys in another order."""
    return json.dumps(rows, sort_keys=True)


def _in_table(text: pa.DataType | None = None) -> Callable[[Path, Rows], None]:
    return lambda path, rows: write_table(path, table_of(rows, text))


def _with_views(table: pa.Table) -> pa.Table:
    """Its columns of strings as views; those within structs stay, for pyarrow's Parquet writes no others."""
    return pa.table(
        {
            name: column.combine_chunks().cast(pa.string_view()) if pa.types.is_string(column.type) else column
            for name, column in zip(table.column_names, table.columns, strict=True)
        }
    )


def _save_to_disk(path: Path, rows: Rows) -> None:
    Dataset(table_of(rows)).save_to_disk(str(path))


def _json_file(path: Path, rows: Rows) -> None:
    path.write_bytes(JSON_FILES[path.name](rows))


def _cells(kind: str) -> Callable[[Path, Rows], None]:
    return lambda path, rows: _write_cells(path, rows, MESSAGE_WRITERS[kind])


# Every format that is read, by the name of a file of it. Those of tables say what ``sayable`` says, all others all.
TABLES: dict[str, Callable[[Path, Rows], None]] = {
    "pairs.parquet": _in_table(),
    "views.parquet": lambda path, rows: write_table(path, _with_views(table_of(rows))),
    "large.parquet": _in_table(pa.large_string()),
    "file.arrow": _in_table(),
    "stream.arrow": _in_table(pa.string_view()),
    "saved": _save_to_disk,
}
WRITERS: dict[str, Callable[[Path, Rows], None]] = {
    **dict.fromkeys(JSON_FILES, _json_file),
    "json.csv": _cells("json"),
    "python.csv": _cells("python"),
    "numpy.csv": _cells("numpy"),
    "numpy_repr.tsv": _cells("numpy repr"),
    "json.tsv": _cells("json"),
    "python.csv.gz": _cells("python"),
    **TABLES,
}
