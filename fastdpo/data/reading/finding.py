"""Names that a person gives → where the rows are: files by split, or a dataset that another library makes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets

from fastdpo.data.reading.opening import FILE_FORMATS, DataFile, format_of
from fastdpo.data.reading.sources import files_of, looks_like_a_path, missing_path_message
from fastdpo.data.terms import DataError, first_line

_OWN_READERS = ("json", "csv", "parquet", "arrow")  # builders of datasets, whose files are read here instead
DataFiles = str | Sequence[str] | Mapping[str, str | Sequence[str]]


@dataclass
class Found:
    """Where rows are.

    Attributes:
        what: what messages call it.
        files: split → what fetches its files.
        dataset: split → the rows, where no files of it can be read here.
    """

    what: str
    files: Mapping[str, Callable[[], list[DataFile]]] = field(default_factory=dict)
    dataset: Callable[[str], datasets.Dataset] | None = None


def find(names: Sequence[str], config_name: str | None, data_files: DataFiles | None = None) -> Found:
    """Where the rows of these are: files, folders, one Hub dataset, or one folder of ``save_to_disk``.

    Args:
        names: what a person gives.
        config_name: the configuration, where a Hub dataset or a folder has several.
        data_files: which files of the one that is named, by split; or ones of their own, where what is named is a
            builder of ``datasets`` (``json``, ``csv``, ``parquet``).

    Raises:
        DataError: there is nothing of the name.
    """
    if not names:
        raise DataError("No file is named.")
    path = Path(names[0]).expanduser()
    if data_files is not None:
        folder = None if names[0] in _OWN_READERS else path
        if folder is None or folder.is_dir():
            return _of_files(_paths(data_files, folder), names[0])
    if len(names) == 1:
        if not path.exists() and not looks_like_a_path(names[0]):
            return _by_builder(names[0], config_name, data_files)
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return Found(names[0], dataset=lambda split: call(lambda: _load_saved(path, split), names[0]))
        if path.is_dir() and (config_name or _says_its_files(path)):
            return _by_builder(names[0], config_name, data_files)
    what = names[0] if len(names) == 1 else f"{len(names)} files"
    return _of_files({None: [Path(name).expanduser() for name in names]}, what)


def _paths(data_files: DataFiles, folder: Path | None) -> dict[str | None, list[Path]]:
    by_split = data_files if isinstance(data_files, Mapping) else {"train": data_files}
    return {
        split: [(folder or Path()) / Path(name).expanduser() for name in ([names] if isinstance(names, str) else names)]
        for split, names in by_split.items()
    }


def _of_files(paths: Mapping[str | None, Sequence[Path]], what: str) -> Found:
    """Files and folders; those under None say their split themselves."""
    by_split: dict[str, list[DataFile]] = {}
    for split, some in paths.items():
        for path in some:
            if not path.exists():
                raise DataError(missing_path_message(path))
            for own, files in files_of(path).items():
                by_split.setdefault(split or own, []).extend(files)
    return Found(what, {split: partial(list, files) for split, files in by_split.items()})


def cut(
    splits: Mapping[str, datasets.Dataset], split: str, what: str, known: Sequence[str] | None = None
) -> datasets.Dataset:
    """What of the splits ``split`` names: one, a slice of one, or a sum of such.

    Raises:
        DataError: there is no such split, or the text is no split.
    """
    sizes = {name: len(rows) for name, rows in splits.items()}
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    except (ValueError, AssertionError, TypeError) as error:
        detail = first_line(str(error) or type(error).__name__).rstrip(".")
        raise DataError(f"{what}: {detail}. There is: {', '.join(known or splits)}.{SPLIT_HINT}") from error
    pieces = [
        splits[part.splitname].select(range(part.from_ or 0, sizes[part.splitname] if part.to is None else part.to))
        for part in parts
    ]
    return pieces[0] if len(pieces) == 1 else datasets.concatenate_datasets(pieces)


SPLIT_HINT = (
    " Choose one with --dataset_train_split or --dataset_test_split; a slice such as 'train[:90%]' or 'train[90%:]' "
    "cuts a part for evaluation out of a dataset that has one split."
)


def splits_in(split: str) -> set[str]:
    """The names of the splits in ``train[:90%]+test`` and the like."""
    return {re.split(r"[\[\s]", part.strip())[0] for part in split.split("+")}


# --------------------------------------------------------------------------------------------------------------------
# The Hub, and folders that say what is in them
# --------------------------------------------------------------------------------------------------------------------


def _load_saved(path: Path, split: str) -> datasets.Dataset:
    saved = datasets.load_from_disk(str(path))
    return cut(saved if isinstance(saved, datasets.DatasetDict) else {"train": saved}, split, str(path))


def _says_its_files(path: Path) -> bool:
    """Whether a card in the folder says which files are which."""
    card = path / "README.md"
    if not card.is_file():
        return False
    head = card.read_text(encoding="utf-8", errors="replace").split("\n---", 1)[0]
    return head.startswith("---") and "\nconfigs:" in head


def _by_builder(name: str, config_name: str | None, data_files: DataFiles | None) -> Found:
    """By way of ``datasets``, which finds and fetches the files; those that are read here it does not read."""
    what = f"dataset {name!r}"
    builder = call(lambda: datasets.load_dataset_builder(name, config_name, data_files=data_files), what)
    urls = {split: list(found) for split, found in (builder.config.data_files or {}).items()}
    is_own = type(builder).__module__.rsplit(".", 1)[-1] in _OWN_READERS
    if is_own and urls and all(format_of(url) is not None for some in urls.values() for url in some):

        def fetch(split: str) -> list[DataFile]:
            paths = call(lambda: datasets.DownloadManager(dataset_name=name).download(urls[split]), what)
            return [DataFile.at(Path(path), url) for path, url in zip(paths, urls[split], strict=True)]

        return Found(what, {split: partial(fetch, split) for split in urls})

    def load(split: str) -> datasets.Dataset:
        return call(lambda: datasets.load_dataset(name, config_name, split=split, data_files=data_files), what)

    return Found(what, dataset=load)


def call(load: Callable[[], Any], source: str) -> Any:
    """What ``load`` returns, with the errors of ``datasets`` as DataError."""
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
        hint = SPLIT_HINT if "nknown split" in detail or "nvalid split" in detail else ""
        raise DataError(f"{source}: {detail}{hint}") from error
