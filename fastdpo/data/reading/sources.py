"""Names that a person gives → files, by split. A name is what it says, and never a pattern."""

from __future__ import annotations

import difflib
import glob
import re
from pathlib import Path

from fastdpo.data.reading.opening import FILE_FORMATS, DataFile, format_of
from fastdpo.data.terms import DataError

# Words in names of files and folders that say of which split these are.
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# What lies beside data and is none.
_NO_ROWS = ("dataset_infos.json", "dataset_info.json", "state.json", "config.json", "metadata.json")


def looks_like_a_path(name: str) -> bool:
    """A Hub id is ``name`` or ``owner/name``, with no file extension of ours."""
    return name.startswith((".", "~", "/")) or name.count("/") > 1 or "\\" in name or format_of(name) is not None


def missing_path_message(path: Path) -> str:
    if not path.parent.is_dir():
        return f"No such file or folder: {path} (the folder {path.parent} does not exist either)."
    if glob.escape(path.name) != path.name:
        matches = sorted(path.parent.glob(path.name))
        like = f" {len(matches)} files are like it: {', '.join(map(str, matches[:3]))}." if matches else ""
        return f"No such file or folder: {path}. Names are not patterns; give each file.{like}"
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    hint = f" Did you mean {path.parent / near[0]}?" if near else f" Look into {path.parent.resolve()}."
    return f"No such file or folder: {path}.{hint}"


def files_of(path: Path) -> dict[str, list[DataFile]]:
    """The files of a folder, or the one file, by split.

    In a folder, the split is told by a word in a file's name, or in a folder's on the way to it (``train``, ``test``,
    ``validation`` and their like); where no name says one, all files are ``train``.

    Raises:
        DataError: there is nothing to read, or some files say their split and others do not.
    """
    if not path.is_dir():
        return {"train": [DataFile.at(path)]}
    files = [p for p in sorted(path.rglob("*")) if p.is_file() and _may_hold_rows(p.relative_to(path))]
    if not files:
        raise DataError(
            f"{path}: nothing to read in this folder. It should have been written by save_to_disk, or hold "
            f"{', '.join(FILE_FORMATS)} files."
        )
    by_split: dict[str, list[DataFile]] = {}
    for file in files:
        by_split.setdefault(_split_of(file.relative_to(path)), []).append(DataFile.at(file))
    others = by_split.pop("", [])
    if not by_split:
        return {"train": others}
    if others:
        named = next(iter(by_split.values()))[0].path.name
        raise DataError(
            f"{path}: {others[0].path.name} says no split in its name, and {named} does. Name the files that are "
            "meant, one after another; or move what does not belong to them."
        )
    return by_split


def _may_hold_rows(path: Path) -> bool:
    hidden = any(part.startswith((".", "_")) for part in path.parts)
    return not hidden and path.name not in _NO_ROWS and format_of(path.name) is not None


def _split_of(path: Path) -> str:
    """The split that the last part of the path that says one says; "" if none does."""
    for part in reversed(path.parts):
        words = set(re.split(r"[^a-z]+", part.lower()))
        for split, names in _SPLIT_WORDS.items():
            if words & set(names):
                return split
    return ""
