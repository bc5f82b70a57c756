"""Preference pairs from files, folders and the Hub, with errors that name the file, the line and the remedy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets

from fastdpo.data.columns import check_columns
from fastdpo.data.reading.finding import DataFiles, Found, cut, find, splits_in
from fastdpo.data.reading.opening import FILE_FORMATS, DataFile
from fastdpo.data.reading.read import How, read_dataset, read_files, rows_of_dataset, rows_of_files
from fastdpo.data.terms import TOKEN_COLUMNS, USED_COLUMNS, DataError, first_line, is_prepared, type_name

__all__ = [
    "FILE_FORMATS",
    "TOKEN_COLUMNS",
    "USED_COLUMNS",
    "DataError",
    "check_columns",
    "first_line",
    "load_preferences",
    "stream_preferences",
    "type_name",
]


def load_preferences(
    name: str | Sequence[str],
    *,
    split: str = "train",
    config_name: str | None = None,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    data_files: DataFiles | None = None,
    groups: bool = False,
) -> datasets.Dataset:
    """Load preference pairs, of any format that is known, and check that the columns are there.

    What the files say is kept to the character; see docs/data.md for what becomes of each format.

    Args:
        name: a dataset id on the Hugging Face Hub; or a folder, written by ``save_to_disk`` or holding files of pairs;
            or such a file; or several of these, one after another.
        split: which split; slices such as ``train[:90%]`` work everywhere. A file alone has one split, ``train``.
        config_name: the configuration, where a Hub dataset or a folder has several.
        format: the format, where it cannot be told or is one's own: its name, or ``path/to/file.py:function``, a
            function of a row that returns ``{"prompt": ..., "chosen": ..., "rejected": ...}``, a list of such, or None.
        columns: where columns have other names: ``{"prompt": "question", ...}``.
        data_files: which files of a Hub dataset or a folder, by split; or, with ``name`` one of ``json``, ``csv`` and
            ``parquet``, the files alone.
        groups: whether several ranked or scored answers to a prompt stay one row, in the columns ``prompt``,
            ``completions`` and ``scores``. Without it they become pairs of neighbours in the order of their scores,
            unless they are in these columns already.

    Returns:
        The pairs, in the columns ``prompt`` (unless the answers begin with it), ``chosen`` and ``rejected``, with
        ``tools`` where rows have them, and with what else the rows have; or groups. ``info.description`` says what they
        were read as.

    Raises:
        DataError: nothing is there, the format is unknown, a line cannot be parsed, the split does not exist, there
            are no rows, or columns are missing or of the wrong type.
    """
    found = _find(name, config_name, data_files)
    how = How(format, dict(columns) if columns else None, groups)
    if found.dataset is not None:
        dataset = found.dataset(split)
        if not is_prepared(dataset.column_names):
            dataset = read_dataset(dataset, found.what, how)
    else:
        wanted = {each: read_files(found.files[each](), how) for each in splits_in(split) & found.files.keys()}
        dataset = cut(wanted, split, found.what, known=list(found.files))
    if len(dataset) == 0:
        read = f" Read as {dataset.info.description}." if dataset.info.description else ""
        raise DataError(f"{found.what}: split {split!r} has no rows.{read}")
    if not is_prepared(dataset.column_names):  # what prepare made and save_to_disk wrote is as good
        check_columns(dataset, found.what)
    return dataset


def stream_preferences(
    name: str | Sequence[str],
    *,
    split: str = "train",
    config_name: str | None = None,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    data_files: DataFiles | None = None,
    groups: bool = False,
) -> datasets.IterableDataset:
    """The same pairs one after another, read as they are needed: for sets that are larger than memory and disk.

    Args:
        name, config_name, format, columns, data_files, groups: as for :func:`load_preferences`. Files of the Hub are
            fetched, and then read as they are needed.
        split: which split; no slice, for that takes the number of rows.

    Returns:
        Rows as those of :func:`load_preferences`, without what a row has nothing in. It can be shuffled by way of a
        buffer, and its ``state_dict`` says where it is.

    Raises:
        DataError: nothing is there, or the split does not exist; and while it is read, a line that cannot be parsed or
            is of another format.
    """
    found = _find(name, config_name, data_files)
    how = How(format, dict(columns) if columns else None, groups)
    if found.dataset is not None:
        rows = found.dataset(split)
        return datasets.IterableDataset.from_generator(
            _dataset_stream, gen_kwargs={"dataset": rows, "source": found.what, "how": how}
        )
    if split not in found.files:
        raise DataError(
            f"{found.what}: there is no split {split!r} to be streamed, there is: {', '.join(found.files)}. A slice of "
            "one takes the number of its rows; leave streaming out, or name files for each part."
        )
    return datasets.IterableDataset.from_generator(_file_stream, gen_kwargs={"files": found.files[split](), "how": how})


def _find(name: str | Sequence[str], config_name: str | None, data_files: DataFiles | None) -> Found:
    return find([name] if isinstance(name, str) else list(name), config_name, data_files)


def _file_stream(files: list[DataFile], how: How) -> Iterator[dict[str, Any]]:
    yield from rows_of_files(files, how, [])


def _dataset_stream(dataset: datasets.Dataset, source: str, how: How) -> Iterator[dict[str, Any]]:
    yield from rows_of_dataset(dataset, source, how, [])
