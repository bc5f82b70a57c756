"""Rows of Parquet and Arrow files, and of datasets.

A struct has all its keys in every row, so a tool call gets those of every other tool call of the file, as nulls. What a
null in a struct stands for cannot be told: that the row says null, or that it says nothing. It is taken for nothing,
which is what it nearly always is, and is left out. (JSON tells the two apart, and there a null stays.) A null for a
whole column's value stays: that row has no such value.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from fastdpo.data.images import IMAGE_COLUMNS
from fastdpo.data.reading.exact import Exact
from fastdpo.data.reading.opening import DataFile

_BATCH_ROWS = 1000
_FILE_MAGIC = b"ARROW1"  # how a file of record batches begins; a stream begins otherwise


def parquet_rows(file: DataFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of every row of a Parquet file, the place in words."""
    with pq.ParquetFile(file.path) as table:
        yield from _rows(table.iter_batches(batch_size=_BATCH_ROWS), table.schema_arrow)


def arrow_rows(file: DataFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same of an Arrow file or stream."""
    with pa.memory_map(str(file.path)) as source:
        is_file = source.read(len(_FILE_MAGIC)) == _FILE_MAGIC
        source.seek(0)
        if is_file:
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            reader = pa.ipc.open_stream(source)
            batches = iter(reader)
        yield from _rows(batches, reader.schema)


def dataset_rows(dataset: datasets.Dataset) -> Iterator[tuple[str, dict[str, Any]]]:
    """The same of a dataset that is there."""
    exact = {name for name, feature in dataset.features.items() if isinstance(feature, Exact)}
    tables = dataset.with_format("arrow").iter(batch_size=_BATCH_ROWS)
    yield from _rows((batch for table in tables for batch in table.to_batches()), dataset.features.arrow_schema, exact)


def fills_in_nulls(dataset: datasets.Dataset) -> bool:
    """Whether a struct in a column has a null."""
    table = dataset.data
    names = [name for name in table.column_names if name not in IMAGE_COLUMNS]  # which have a path or bytes
    return any(_null_in_struct(chunk) for name in names for chunk in table.column(name).chunks)


def _null_in_struct(array: pa.Array) -> bool:
    kind = array.type
    if pa.types.is_struct(kind):
        return any(child.null_count or _null_in_struct(child) for child in array.flatten())
    if pa.types.is_map(kind):
        return bool(array.items.null_count) or _null_in_struct(array.items)
    return _is_list(kind) and _null_in_struct(array.flatten())


def _rows(
    batches: Iterable[pa.RecordBatch], schema: pa.Schema, exact: Iterable[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    readers = {field.name: _from_json if field.name in exact else _reader(field.type) for field in schema}
    number = 0
    for whole in batches:
        for start in range(0, whole.num_rows, _BATCH_ROWS):
            batch = whole.slice(start, _BATCH_ROWS)
            columns = []
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                read, values = readers[name], column.to_pylist()
                columns.append(values if read is None else [None if v is None else read(v) for v in values])
            for values in zip(*columns, strict=True):
                yield f"row {number}", dict(zip(batch.schema.names, values, strict=True))
                number += 1


def _from_json(text: str) -> Any:
    return json.loads(text)


def _reader(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """What makes of a value, as ``to_pylist`` gives it, the one that the row says; None where that is the same."""
    if isinstance(kind, pa.JsonType):
        return _from_json
    if pa.types.is_dictionary(kind):
        return _reader(kind.value_type)
    if pa.types.is_struct(kind):
        readers = {field.name: _reader(field.type) or _same for field in kind}
        return lambda value: {key: readers[key](item) for key, item in value.items() if item is not None}
    if pa.types.is_map(kind):
        read_value = _reader(kind.item_type) or _same
        return lambda value: {key: None if item is None else read_value(item) for key, item in value}
    if _is_list(kind):
        read = _reader(kind.value_type)
        return None if read is None else lambda value: [None if item is None else read(item) for item in value]
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind):
        return _as_text  # text from writers that do not mark it as such
    return None


def _same(value: Any) -> Any:
    return value


def _is_list(kind: pa.DataType) -> bool:
    tests = (
        pa.types.is_list,
        pa.types.is_large_list,
        pa.types.is_fixed_size_list,
        pa.types.is_list_view,
        pa.types.is_large_list_view,
    )
    return any(test(kind) for test in tests)


def _as_text(value: bytes) -> Any:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value
