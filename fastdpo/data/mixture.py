"""Several datasets as one: TRL's ``datasets:`` of a configuration file, with shares, and a part held out."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import datasets

from fastdpo.data.files import load_preferences, stream_preferences
from fastdpo.data.reading.finding import DataFiles
from fastdpo.data.reading.read import unite
from fastdpo.data.terms import DataError


@dataclass(frozen=True)
class Part:
    """One dataset of a mixture, in the words of ``trl.DatasetConfig``.

    Attributes:
        path: a Hub dataset, a folder, a file, or a builder of ``datasets`` (``json`` …) with ``data_files``.
        name: the configuration, where there are several.
        data_dir: the folder of the dataset that is meant.
        data_files: which files, by split; a list or one is the split ``train``.
        split: which split, or slice of one.
        columns: the columns to keep; by default all.
        fraction: share of the mixture. Shares are made to sum to 1, and the mixture is as large as it can be with no
            row twice; the first rows of each dataset are taken. For all datasets, or for none.
        format: the format, where it cannot be told: see :func:`fastdpo.data.load_preferences`. (TRL has no such key.)
    """

    path: str
    name: str | None = None
    data_dir: str | None = None
    data_files: DataFiles | None = None
    split: str = "train"
    columns: Sequence[str] | None = None
    fraction: float | None = None
    format: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Part:
        """A part as a configuration file writes it.

        Raises:
            DataError: a key is unknown, or ``path`` is missing, or a share is no positive number.
        """
        known = [each.name for each in fields(cls)]
        for key in given:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(known)}."
                raise DataError(f"datasets: unknown key {key!r}. {hint}")
        if not isinstance(given.get("path"), str):
            raise DataError("datasets: each dataset needs a 'path': a Hub dataset, a folder or a file.")
        part = cls(**given)
        if part.fraction is not None and not (isinstance(part.fraction, (int, float)) and part.fraction > 0):
            raise DataError(f"datasets: the fraction of {part.path} is {part.fraction!r}; it should be above 0.")
        return part

    def _where(self) -> str:
        return f"{self.path.rstrip('/')}/{self.data_dir}" if self.data_dir else self.path

    def load(self, groups: bool = False) -> datasets.Dataset:
        rows = load_preferences(self._where(), split=self.split, **self._how(groups))
        if self.columns is None:
            return rows
        missing = [name for name in self.columns if name not in rows.column_names]
        if missing:
            raise DataError(f"{self.path}: no column {missing[0]!r} to keep; there are {', '.join(rows.column_names)}.")
        return rows.select_columns(list(self.columns))

    def stream(self, groups: bool = False) -> datasets.IterableDataset:
        return stream_preferences(self._where(), split=self.split, **self._how(groups))

    def _how(self, groups: bool) -> dict[str, Any]:
        return {
            "config_name": self.name,
            "format": self.format,
            "data_files": self.data_files,
            "groups": groups,
        }


def load_mixture(parts: Sequence[Part], groups: bool = False) -> datasets.Dataset:
    """The pairs of all parts, one part after another; with ``groups`` see :func:`load_preferences`.

    Raises:
        DataError: a part cannot be read, or some have a share and others none.
    """
    _check_shares(parts)
    loaded = [part.load(groups) for part in parts]
    sizes = shares([len(rows) for rows in loaded], [part.fraction for part in parts])
    return unite([rows.select(range(size)) for rows, size in zip(loaded, sizes, strict=True)])


def stream_mixture(parts: Sequence[Part], groups: bool = False) -> datasets.IterableDataset:
    """The same, read as they are needed.

    Raises:
        DataError: see :func:`load_mixture`; or a part has a share, or columns to keep.
    """
    if any(part.fraction is not None or part.columns is not None for part in parts):
        raise DataError("A part with 'fraction' or 'columns' cannot be streamed; leave these out, or streaming.")
    streams = [part.stream(groups) for part in parts]
    return datasets.IterableDataset.from_generator(_in_turn, gen_kwargs={"streams": streams})


def _in_turn(streams: list[datasets.IterableDataset]) -> Iterator[dict[str, Any]]:
    # concatenate_datasets would look at the first rows of each, and make the others' columns of their types.
    for stream in streams:
        yield from stream


def shares(sizes: Sequence[int], fractions: Sequence[float | None]) -> list[int]:
    """How many rows of each part are taken, so that they are in these proportions and none is taken twice.

    Args:
        sizes: how many there are.
        fractions: the proportions; None for all rows.
    """
    given = [fraction for fraction in fractions if fraction is not None]
    if not given:
        return list(sizes)
    weights = [fraction / sum(given) for fraction in given]
    total = min(size / weight for size, weight in zip(sizes, weights, strict=True))
    return [min(size, round(weight * total)) for size, weight in zip(sizes, weights, strict=True)]


def _check_shares(parts: Sequence[Part]) -> None:
    if not parts:
        raise DataError("datasets: no dataset is named.")
    given = [part.fraction is not None for part in parts]
    if any(given) and not all(given):
        raise DataError("datasets: give every dataset a 'fraction', or none.")


def hold_out(dataset: datasets.Dataset, size: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    """A part to train on and one to evaluate on, chosen at random, the same for the same seed.

    Args:
        dataset: all pairs.
        size: how many of them, or which share of them, are held out.
        seed: of the choice.

    Raises:
        DataError: nothing would be left of one of the two.
    """
    try:
        parts = dataset.train_test_split(test_size=int(size) if size >= 1 else size, seed=seed)
    except ValueError as error:
        raise DataError(f"test_split_size is {size:g}, of {len(dataset)} pairs: {error}") from error
    return parts["train"], parts["test"]
