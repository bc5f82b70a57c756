"""Preference pairs from files, folders and the Hub, with errors that name the file, the line and the remedy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from fastdpo.data.columns import check_columns
from fastdpo.data.reading.opening import FILE_FORMATS, DataFile, format_of
from fastdpo.data.reading.read import How, read_dataset, read_files
from fastdpo.data.reading.sources import files_of, looks_like_a_path, missing_path_message
from fastdpo.data.terms import TOKEN_COLUMNS, USED_COLUMNS, DataError, first_line, type_name

__all__ = [
    "FILE_FORMATS",
    "TOKEN_COLUMNS",
    "USED_COLUMNS",
    "DataError",
    "check_columns",
    "first_line",
    "load_preferences",
    "type_name",
]

_OWN_READERS = ("json", "csv", "parquet", "arrow")  # builders of datasets, whose files are read here instead


def load_preferences(
    name: str | Sequence[str],
    *,
    split: str = "train",
    config_name: str | None = None,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
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

    Returns:
        The pairs, in the columns ``prompt`` (unless the answers begin with it), ``chosen`` and ``rejected``, with
        ``tools`` where rows have them, and with what else the rows have. ``info.description`` says what they were read
        as.

    Raises:
        DataError: nothing is there, the format is unknown, a line cannot be parsed, the split does not exist, there
            are no rows, or columns are missing or of the wrong type.
    """
    names = [name] if isinstance(name, str) else list(name)
    if not names:
        raise DataError("No file is named.")
    how = How(format, dict(columns) if columns else None)
    what = names[0] if len(names) == 1 else f"{len(names)} files"
    paths = [Path(each).expanduser() for each in names]
    if len(names) == 1 and not paths[0].exists() and not looks_like_a_path(names[0]):
        dataset = _load_by_builder(names[0], split, config_name, how)
    elif len(names) == 1 and _is_saved(paths[0]):
        dataset = _call_loader(lambda: _load_saved(paths[0], split), what)
        if not set(TOKEN_COLUMNS) <= set(dataset.column_names):
            dataset = read_dataset(dataset, what, how)
    elif len(names) == 1 and paths[0].is_dir() and (config_name or _says_its_files(paths[0])):
        dataset = _load_by_builder(names[0], split, config_name, how)
    else:
        by_split: dict[str, list[DataFile]] = {}
        for path in paths:
            if not path.exists():
                raise DataError(missing_path_message(path))
            for each, files in files_of(path).items():
                by_split.setdefault(each, []).extend(files)
        dataset = _read_splits(by_split, split, what, how)
    if len(dataset) == 0:
        raise DataError(f"{what}: split {split!r} has no rows.{_why_empty(dataset)}")
    if not set(TOKEN_COLUMNS) <= set(dataset.column_names):  # what prepare made and save_to_disk wrote is as good
        check_columns(dataset, what)
    return dataset


def _why_empty(dataset: datasets.Dataset) -> str:
    return f" Read as {dataset.info.description}." if dataset.info.description else ""


def _read_splits(by_split: Mapping[str, Sequence[DataFile]], split: str, what: str, how: How) -> datasets.Dataset:
    """What of the splits' files ``split`` names: a split, a slice of one, or a sum of such."""
    wanted = {name: read_files(by_split[name], how) for name in by_split if name in split}
    return _cut(wanted, split, what, known=by_split)


def _cut(
    splits: Mapping[str, datasets.Dataset], split: str, what: str, known: Mapping[str, Any] | None = None
) -> datasets.Dataset:
    sizes = {name: len(rows) for name, rows in splits.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    except (ValueError, AssertionError, TypeError) as error:
        detail = first_line(str(error) or type(error).__name__)
        names = ", ".join(known if known is not None else splits)
        raise DataError(f"{what}: {detail.rstrip('.')}. There is: {names}.{_split_hint()}") from error
    pieces = [
        splits[part.splitname].select(range(part.from_ or 0, sizes[part.splitname] if part.to is None else part.to))
        for part in parts
    ]
    return pieces[0] if len(pieces) == 1 else datasets.concatenate_datasets(pieces)


def _split_hint() -> str:
    return (
        " Choose one with --dataset_train_split or --dataset_test_split; a slice such as 'train[:90%]' or "
        "'train[90%:]' cuts a part for evaluation out of a dataset that has one split."
    )


# --------------------------------------------------------------------------------------------------------------------
# The Hub, and folders that say what is in them
# --------------------------------------------------------------------------------------------------------------------


def _is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").exists() or (path / "state.json").exists()


def _load_saved(path: Path, split: str) -> datasets.Dataset:
    saved = datasets.load_from_disk(str(path))
    return _cut(saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}, split, str(path))


def _says_its_files(path: Path) -> bool:
    """Whether a card in the folder says which files are which."""
    card = path / "README.md"
    if not card.is_file():
        return False
    head = card.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0]
    return head.startswith("---") and "\nconfigs:" in head


def _load_by_builder(name: str, split: str, config_name: str | None, how: How) -> datasets.Dataset:
    """By way of ``datasets``, which finds and fetches the files; those that are read here it does not read."""
    what = f"dataset {name!r}"
    builder = _call_loader(lambda: datasets.load_dataset_builder(name, config_name), what)
    files = builder.config.data_files
    if builder.dataset_name in _OWN_READERS or type(builder).__module__.rsplit(".", 1)[-1] in _OWN_READERS:
        urls = {each: list(files[each]) for each in files}
        if urls and all(format_of(url) is not None for each in urls.values() for url in each):
            wanted = {each: urls[each] for each in urls if each in split}
            paths = _call_loader(lambda: datasets.DownloadManager(dataset_name=name).download(wanted), what)
            local = {
                each: [DataFile.at(Path(path), url) for path, url in zip(paths[each], wanted[each], strict=True)]
                for each in wanted
            }
            wanted_rows = {each: read_files(found, how) for each, found in local.items()}
            return _cut(wanted_rows, split, what, known=urls)
    dataset = _call_loader(lambda: datasets.load_dataset(name, config_name, split=split), what)
    return read_dataset(dataset, what, how)


def _call_loader(load: Callable[[], Any], source: str) -> Any:
    try:
        return load()
    except DataError:
        raise
    except ConnectionError as error:
        raise DataError(
            f"{source}: there is no such file or folder here, and the Hub could not be reached ({error}). Check the "
            "name and the network; a local file needs its path and one of the extensions "
            f"{', '.join(FILE_FORMATS)}."
        ) from error
    except (ValueError, OSError, datasets.exceptions.DatasetsError, StopIteration) as error:
        # Libraries wrap what happened in "An error occurred while generating the dataset".
        detail = first_line(str(error.__cause__ or error) or type(error).__name__)
        hint = _split_hint() if "nknown split" in detail or "nvalid split" in detail else ""
        raise DataError(f"{source}: {detail}{hint}") from error
