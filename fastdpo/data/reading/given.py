"""Rows that are handed over as Python objects: pairs, or of a format that files come in, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets

from fastdpo.data.formats.names import missing_columns_message
from fastdpo.data.reading.read import How, read_dataset
from fastdpo.data.reading.table_rows import dataset_rows
from fastdpo.data.terms import DataError

_SOURCE = "the dataset"
_LOOKED_AT = 100  # rows by which a format is told


def as_pairs(dataset: datasets.Dataset, groups: bool = False) -> datasets.Dataset:
    """The dataset as it is where its rows are pairs as they should be, or else what :func:`read_dataset` makes of it.

    With ``groups`` several answers to a prompt stay one row.

    Its format is told by its first rows, as that of a file is; of one that ``load_preferences`` read it is known.

    Raises:
        DataError: its format cannot be told, or a row is not of it.
    """
    if dataset.info.description and missing_columns_message(dataset.column_names, _SOURCE) is None:
        return dataset
    few = dataset.select(range(min(len(dataset), _LOOKED_AT)))
    if _are_pairs([row for _, row in dataset_rows(few)], groups):
        return dataset
    return read_dataset(dataset, _SOURCE, How(groups=groups))


def rows_as_pairs(rows: list[dict[str, Any]], groups: bool = False) -> list[dict[str, Any]]:
    """The same of rows in memory."""
    return rows if _are_pairs(rows[:_LOOKED_AT], groups) else _converted(rows, groups)


def _are_pairs(rows: list[dict[str, Any]], groups: bool) -> bool:
    """Whether rows are pairs, or groups, or some the one and some the other, as they should be."""
    kinds: list[list[dict[str, Any]]] = [[], []]
    for row in rows:
        kinds[row.get("completions") is None and row.get("chosen") is not None].append(row)
    try:
        return all(_converted(kind, groups) == kind for kind in kinds if kind)
    except DataError as error:
        if "--format" not in str(error) and "--columns" not in str(error):
            raise
        raise DataError(
            f"{error} In Python: fastdpo.data.read_preferences(dataset, format=..., columns=...)."
        ) from error


def _converted(rows: list[dict[str, Any]], groups: bool) -> list[dict[str, Any]]:
    places = ((f"row {number}", row) for number, row in enumerate(rows))
    return list(How(groups=groups).pairs(places, _SOURCE, []))


def read_preferences(
    dataset: datasets.Dataset,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    groups: bool = False,
) -> datasets.Dataset:
    """The pairs of a dataset whose format cannot be told, or whose columns have names of their own.

    Args:
        dataset: rows of any format that is known; its first rows tell which.
        format: the format, where they do not: see :func:`fastdpo.data.load_preferences`.
        columns: where columns have other names: ``{"prompt": "question", ...}``.
        groups: whether several answers to a prompt stay one row; see :func:`fastdpo.data.load_preferences`.

    Returns:
        As :func:`fastdpo.data.load_preferences`.

    Raises:
        DataError: the format is unknown, or a row is not of it.
    """
    return read_dataset(dataset, _SOURCE, How(format, dict(columns) if columns else None, groups))
