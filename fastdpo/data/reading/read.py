"""Files, or a dataset that is there already → a dataset of pairs, and what to say of how it was read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets

from fastdpo.data.formats.convert import convert, read_as
from fastdpo.data.formats.registry import definition_of
from fastdpo.data.reading.opening import DataFile
from fastdpo.data.reading.rows import rows_of
from fastdpo.data.reading.store import Facts, digest_of, key_of, stored
from fastdpo.data.reading.table_rows import dataset_rows


@dataclass(frozen=True)
class How:
    """How rows are to be understood.

    Attributes:
        format: a format's name, or ``path/to/file.py:function``; None to tell it by the rows.
        columns: new name → name in the files, where columns are called otherwise.
    """

    format: str | None = None
    columns: Mapping[str, str] | None = None

    def key(self) -> list[Any]:
        return [definition_of(self.format), sorted((self.columns or {}).items())]


def read_files(files: Sequence[DataFile], how: How) -> datasets.Dataset:
    """The pairs of files, one after another, each read by its own format.

    Raises:
        DataError: a file cannot be read, or its format cannot be told.
    """

    def read(facts: Facts) -> Iterator[dict[str, Any]]:
        for file in files:
            yield from file_rows(file, how, facts)

    names = [file.name for file in files]
    digests = []
    for file in files:
        with file.reading():
            digests.append([digest_of(file), file.format])
    dataset, facts = stored(key_of("files", digests, how.key()), read)
    dataset.info.description = read_as(facts, names)
    return dataset


def file_rows(file: DataFile, how: How, facts: Facts) -> Iterator[dict[str, Any]]:
    """The pairs of one file."""
    return convert(rows_of(file), file.name, format=how.format, columns=how.columns, facts=facts)


def read_dataset(dataset: datasets.Dataset, source: str, how: How) -> datasets.Dataset:
    """The pairs of a dataset.

    Raises:
        DataError: its format cannot be told.
    """

    def read(facts: Facts) -> Iterator[dict[str, Any]]:
        return convert(dataset_rows(dataset), source, format=how.format, columns=how.columns, facts=facts)

    read_, facts = stored(key_of("dataset", dataset._fingerprint, how.key()), read)
    read_.info.description = read_as(facts, [source])
    return read_
