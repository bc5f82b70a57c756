"""Files, or a dataset that is there already → a dataset of pairs, and what to say of how it was read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets

from fastdpo.data.formats.convert import convert, read_as
from fastdpo.data.formats.messages import split_at_shared
from fastdpo.data.formats.registry import definition_of
from fastdpo.data.images import resolved
from fastdpo.data.reading.opening import DataFile
from fastdpo.data.reading.origins import origins_of, remember
from fastdpo.data.reading.rows import rows_of
from fastdpo.data.reading.store import Facts, digest_of, key_of, stored
from fastdpo.data.reading.table_rows import dataset_rows, fills_in_nulls
from fastdpo.data.terms import DataError

_NAMES_IMAGES = "names_images"  # in what is known of a file


@dataclass(frozen=True)
class How:
    """How rows are to be understood.

    Attributes:
        format: a format's name, or ``path/to/file.py:function``; None to tell it by the rows.
        columns: new name → name in the files, where columns are called otherwise.
        groups: whether several answers to a prompt stay one row.
    """

    format: str | None = None
    columns: Mapping[str, str] | None = None
    groups: bool = False

    def key(self) -> list[Any]:
        key = [definition_of(self.format), sorted((self.columns or {}).items())]
        return [*key, "groups"] if self.groups else key

    def pairs(self, rows: Iterator[tuple[str, dict[str, Any]]], source: str, facts: Facts) -> Iterator[dict[str, Any]]:
        """What the rows are, in columns of fastdpo's own names."""
        return convert(rows, source, format=self.format, columns=self.columns, groups=self.groups, facts=facts)


def read_files(files: Sequence[DataFile], how: How) -> datasets.Dataset:
    """The pairs of files, one after another, each read by its own format.

    Raises:
        DataError: a file cannot be read, or its format cannot be told; or some have a prompt of their own, and others
            texts that begin with it.
    """
    digests = []
    for file in files:
        with file.reading():
            digests.append([digest_of(file), file.format])

    def read(*folders: list[str]) -> tuple[datasets.Dataset, Facts]:
        key = key_of("files", digests, how.key(), *folders)
        return stored(key, lambda facts: rows_of_files(files, how, facts))

    dataset, facts = read()
    if any(fact.get(_NAMES_IMAGES) for fact in facts):  # equal files beside other images
        dataset, facts = read([str(file.path.resolve().parent) for file in files])
    dataset.info.description = read_as(facts, [file.name for file in files])
    remember(dataset, [(file.name, partial(_pairs_of, file, files, how)) for file in files])
    return dataset


def rows_of_files(files: Sequence[DataFile], how: How, facts: Facts) -> Iterator[dict[str, Any]]:
    """The pairs of files, one after another."""
    mixed = _are_mixed(files, how)
    for file in files:
        rows = file_rows(file, how, facts)
        yield from with_prompts(rows, file.name) if mixed else rows


def _pairs_of(file: DataFile, files: Sequence[DataFile], how: How) -> Iterator[dict[str, Any]]:
    """Those of one of the files, as they are where all are one after another."""
    rows = file_rows(file, how, [])
    return with_prompts(rows, file.name) if _are_mixed(files, how) else rows


def _are_mixed(files: Sequence[DataFile], how: How) -> bool:
    """Whether the pairs of some files have a prompt of their own, and those of others begin with it."""
    return len(files) > 1 and len({_has_prompt(file, how) for file in files} - {None}) > 1


def _has_prompt(file: DataFile, how: How) -> bool | None:
    """Whether a file's pairs have a prompt of their own; None if it has no pairs."""
    first = next(file_rows(file, how, []), None)
    return None if first is None else "prompt" in first


def with_prompts(rows: Iterable[dict[str, Any]], source: str) -> Iterator[dict[str, Any]]:
    """Pairs that begin with their prompt, with it apart, to stand beside others.

    Raises:
        DataError: they are texts, where the end of a prompt cannot be told.
    """
    for row in rows:
        chosen, rejected = row.get("chosen"), row.get("rejected")
        if "prompt" in row or chosen is None or rejected is None:
            yield row
        elif isinstance(chosen, list) and isinstance(rejected, list):
            prompt, chosen, rejected = split_at_shared(chosen, rejected)
            yield row | {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        else:
            raise DataError(
                f"{source}: its pairs have no prompt of their own, and those that they are joined with have. Give the "
                "prompt a column in all of them, or train on one after another."
            )


def file_rows(file: DataFile, how: How, facts: Facts) -> Iterator[dict[str, Any]]:
    """The pairs of one file, and of its folder where they name images."""
    folder, names_images = file.path.resolve().parent, False

    def rows() -> Iterator[tuple[str, dict[str, Any]]]:
        nonlocal names_images
        for place, row in rows_of(file):
            whole = resolved(row, folder)
            names_images = names_images or whole is not row
            yield place, whole

    yield from how.pairs(rows(), file.name, facts)
    if names_images:
        facts[-1][_NAMES_IMAGES] = True


def rows_of_dataset(dataset: datasets.Dataset, source: str, how: How, facts: Facts) -> Iterator[dict[str, Any]]:
    """The pairs of a dataset, one after another."""
    return how.pairs(dataset_rows(dataset), source, facts)


def read_dataset(dataset: datasets.Dataset, source: str, how: How) -> datasets.Dataset:
    """The pairs of a dataset.

    Raises:
        DataError: its format cannot be told.
    """
    key = key_of("dataset", dataset._fingerprint, how.key())
    pairs, facts = stored(key, lambda facts: rows_of_dataset(dataset, source, how, facts))
    pairs.info.description = read_as(facts, [source])
    return pairs


def as_said(dataset: datasets.Dataset) -> datasets.Dataset:
    """The dataset as it is, or, where structs filled in nulls that its rows did not say, without these."""
    if not fills_in_nulls(dataset):
        return dataset
    rows, _ = stored(key_of("said", dataset._fingerprint), lambda facts: (row for _, row in dataset_rows(dataset)))
    rows.info.description = dataset.info.description
    return rows


def unite(parts: Sequence[datasets.Dataset]) -> datasets.Dataset:
    """Pairs of several datasets, one after another, whatever the types of their columns.

    Raises:
        DataError: some have a prompt of their own, and others texts that begin with it.
    """
    described = "; ".join(dict.fromkeys(part.info.description for part in parts if part.info.description))
    if all(part.features == parts[0].features for part in parts):
        united = datasets.concatenate_datasets(list(parts)) if len(parts) > 1 else parts[0]
    else:
        mixed = len({"prompt" in part.column_names for part in parts}) > 1

        def read(facts: Facts) -> Iterator[dict[str, Any]]:
            for part in parts:
                rows = (row for _, row in dataset_rows(part))
                yield from with_prompts(rows, part.info.description or "a dataset") if mixed else rows

        united, _ = stored(key_of("union", [part._fingerprint for part in parts]), read)
        remember(united, [origin for part in parts for origin in origins_of(part)])
    united.info.description = described
    return united
