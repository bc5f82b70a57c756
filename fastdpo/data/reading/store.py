"""Rows → a dataset on disk, memory-mapped: what is in memory does not grow with the number of rows.

It lies in the cache of ``datasets``, under a name made of what was read, so that it is read once, and so that what is
derived from equal files (tokenised rows) is found again, wherever these lie.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets.table import InMemoryTable, MemoryMappedTable

from fastdpo.data.reading.exact import features_of, kind_of, to_array, widen, wider
from fastdpo.data.reading.opening import DataFile

VERSION = 1  # of what becomes of a file; another one is not taken for this one's work
BATCH_ROWS = 1000

Facts = list[dict[str, Any]]  # what is to be said of a file, for each: see fastdpo.data.formats.convert


def key_of(*parts: Any) -> str:
    """A name for what is made of these."""
    return hashlib.blake2b(json.dumps([VERSION, *parts]).encode(), digest_size=16).hexdigest()


def digest_of(file: DataFile) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with file.path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def stored(key: str, read: Callable[[Facts], Iterable[dict[str, Any]]]) -> tuple[datasets.Dataset, Facts]:
    """The rows that ``read`` yields, as a dataset; from the disk where they were stored before.

    Args:
        key: the name for them, see :func:`key_of`.
        read: yields the rows, and adds what is to be known of them to the list that it is given.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "fastdpo"
    path = folder / f"{key}.arrow"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="writing-", dir=folder) as temporary:
            facts: Facts = []
            writing = Path(temporary) / "rows.arrow"
            _write(read(facts), writing, facts)
            os.replace(writing, path)  # whole or not at all, whoever else writes the same
    table = MemoryMappedTable.from_file(str(path))
    told = json.loads(table.schema.metadata[b"fastdpo"])
    info = datasets.DatasetInfo(features=features_of(told["kinds"]))
    if not table.num_rows:  # a file of no rows cannot be mapped
        table = InMemoryTable(table.table)
    return datasets.Dataset(table, info=info, fingerprint=key), told["facts"]


def _write(rows: Iterable[dict[str, Any]], path: Path, facts: Facts) -> None:
    """An Arrow stream of the rows. What was written before a column turned out wider is written again at the end."""
    kinds: dict[str, str] = {}
    parts: list[tuple[Path, dict[str, str]]] = []
    writer: pa.RecordBatchStreamWriter | None = None
    try:
        for batch in _batches(iter(rows)):
            columns = {
                name: [row.get(name) for row in batch] for name in dict.fromkeys(k for row in batch for k in row)
            }
            found = kinds | {
                name: wider(kinds.get(name, "null"), kind_of(values, name)) for name, values in columns.items()
            }
            if writer is None or found != kinds:
                if writer is not None:
                    writer.close()
                kinds = found
                parts.append((path.with_name(f"part-{len(parts)}.arrow"), kinds))
                writer = pa.ipc.new_stream(str(parts[-1][0]), _schema(kinds))
            arrays = [to_array(columns.get(name, [None] * len(batch)), kind, name) for name, kind in kinds.items()]
            writer.write_batch(pa.record_batch(arrays, schema=_schema(kinds)))
    finally:
        if writer is not None:
            writer.close()
    schema = _schema(kinds).with_metadata({"fastdpo": json.dumps({"kinds": kinds, "facts": facts})})
    with pa.ipc.new_stream(str(path), schema) as final:
        for part, old in parts:
            with pa.memory_map(str(part)) as source:
                for record in pa.ipc.open_stream(source):
                    final.write_batch(_fitted(record, old, kinds, schema))
            part.unlink()


def _batches(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while batch := list(islice(rows, BATCH_ROWS)):
        yield batch


def _schema(kinds: dict[str, str]) -> pa.Schema:
    return features_of(kinds).arrow_schema.remove_metadata()


def _fitted(record: pa.RecordBatch, old: dict[str, str], new: dict[str, str], schema: pa.Schema) -> pa.RecordBatch:
    arrays = [
        widen(record.column(name), old[name], kind, name)
        if name in old
        else to_array([None] * record.num_rows, kind, name)
        for name, kind in new.items()
    ]
    return pa.record_batch(arrays, schema=schema)
