"""Preference pairs from files, folders and the Hub, with errors that name the file, the line and the remedy."""

from __future__ import annotations

import difflib
import gzip
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import datasets

from fastdpo.errors import InputError

# Each also with .gz behind it, but for parquet, which is compressed inside.
FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids")
# What rows may have beside the reference's log-probabilities; other columns are left out, and named in the summary.
USED_COLUMNS = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")


# An answer "NA", "None" or "42" is text, and so is an empty cell.
CSV_OPTIONS = {"keep_default_na": False, "converters": dict.fromkeys(("prompt", "chosen", "rejected"), str)}
# Columns in which public sets keep the prompt under another name.
PROMPT_NAMES = ("question", "instruction", "input", "query", "context", "user", "problem")


class DataError(InputError):
    """Preference data that cannot be used; the message says which input, what is wrong, and what to do."""


def load_preferences(name: str, *, split: str = "train", config_name: str | None = None) -> datasets.Dataset:
    """Load preference pairs and check that the columns are there.

    Args:
        name: a dataset id on the Hugging Face Hub; or a folder, written by ``save_to_disk`` or holding json, jsonl,
            parquet or csv files; or one such file, also with .gz (but for parquet).
        split: which split; slices such as ``train[:90%]`` work everywhere. A single file has one split, ``train``.
        config_name: the configuration, where a Hub dataset or a folder has several.

    Returns:
        The rows, unchanged, with at least the columns ``chosen`` and ``rejected``.

    Raises:
        DataError: nothing is there, the format is unknown, a line cannot be parsed, the split does not exist, there
            are no rows, or columns are missing or of the wrong type.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        dataset = _load_folder(path, split, config_name)
    elif path.exists():
        dataset = _load_file(path, split)
    elif _looks_like_a_path(name):
        raise DataError(_missing_path_message(path))
    else:
        dataset = _call_loader(lambda: datasets.load_dataset(name, config_name, split=split), f"dataset {name!r}")
    if len(dataset) == 0:
        raise DataError(f"{name}: split {split!r} has no rows.")
    if not set(TOKEN_COLUMNS) <= set(dataset.column_names):  # what prepare made and save_to_disk wrote is as good
        check_columns(dataset, name)
    return dataset


def _looks_like_a_path(name: str) -> bool:
    """A Hub id is ``name`` or ``owner/name``, with no file extension of ours."""
    return name.startswith((".", "~", "/")) or name.count("/") > 1 or "\\" in name or _format_of(Path(name)) is not None


def _format_of(path: Path) -> str | None:
    """The loader for a file, by its extensions; None if there is none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        file_format = FILE_FORMATS.get("".join(suffixes[-2:-1]))
        return None if file_format == "parquet" else file_format
    return FILE_FORMATS.get("".join(suffixes[-1:]))


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _missing_path_message(path: Path) -> str:
    if not path.parent.is_dir():
        return f"No such file or folder: {path} (the folder {path.parent} does not exist either)."
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.iterdir()], n=1)
    hint = f" Did you mean {path.parent / near[0]}?" if near else f" Look into {path.parent.resolve()}."
    return f"No such file or folder: {path}.{hint}"


def _load_file(path: Path, split: str) -> datasets.Dataset:
    file_format = _format_of(path)
    if file_format is None:
        raise DataError(
            f"{path}: unknown extension {path.suffix or '(none)'!r}. Files with the extension "
            f"{', '.join(FILE_FORMATS)}, and these with .gz, can be read."
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty (0 bytes).")
    try:
        if file_format != "parquet":
            _check_encoding(path)
        if file_format == "json":
            _check_json(path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    options = CSV_OPTIONS if file_format == "csv" else {}
    return _call_loader(
        lambda: datasets.load_dataset(file_format, data_files=str(path), split=split, **options), str(path)
    )


def _load_folder(path: Path, split: str, config_name: str | None) -> datasets.Dataset:
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _call_loader(lambda: _load_saved(path, split), str(path))
    files = sorted(p for p in path.rglob("*") if _format_of(p) is not None)
    if not files:
        raise DataError(
            f"{path}: nothing to read in this folder. It should have been written by save_to_disk, or hold "
            f"{', '.join(FILE_FORMATS)} files."
        )
    options = CSV_OPTIONS if all(_format_of(file) == "csv" for file in files) else {}
    try:
        return _call_loader(lambda: datasets.load_dataset(str(path), config_name, split=split, **options), str(path))
    except DataError:
        # The loader seldom says which file it stumbled over. If it is the text of one, this raises something better.
        for file in files:
            if _format_of(file) == "json":
                _check_json(file)
        raise


def _load_saved(path: Path, split: str) -> datasets.Dataset:
    saved = datasets.load_from_disk(str(path))
    splits = saved if isinstance(saved, datasets.DatasetDict) else datasets.DatasetDict({"train": saved})
    sizes = {name: len(rows) for name, rows in splits.items()}
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    pieces = [
        splits[part.splitname].select(range(part.from_ or 0, sizes[part.splitname] if part.to is None else part.to))
        for part in parts
    ]
    return datasets.concatenate_datasets(pieces)


def _call_loader(load: Callable[[], datasets.Dataset], source: str) -> datasets.Dataset:
    try:
        return load()
    except ConnectionError as error:
        raise DataError(
            f"{source}: there is no such file or folder here, and the Hub could not be reached ({error}). Check the "
            "name and the network; a local file needs its path and one of the extensions "
            f"{', '.join(FILE_FORMATS)}."
        ) from error
    except (ValueError, OSError, datasets.exceptions.DatasetsError, StopIteration) as error:
        # Libraries wrap what happened in "An error occurred while generating the dataset".
        detail = str(error.__cause__ or error) or type(error).__name__
        raise DataError(f"{source}: {first_line(detail)}{_split_hint(detail)}") from error


def _split_hint(detail: str) -> str:
    if "nknown split" not in detail and "nvalid split" not in detail:
        return ""
    return (
        " Choose one with --dataset_train_split or --dataset_test_split; a slice such as 'train[:90%]' or "
        "'train[90%:]' cuts a part for evaluation out of a dataset that has one split."
    )


def first_line(text: str) -> str:
    return text.strip().splitlines()[0]


def _check_encoding(path: Path) -> None:
    """Name what a spreadsheet or a Windows editor may have written instead of UTF-8."""
    with _open(path) as file:
        start = file.read(4)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or (len(start) > 1 and start.count(0) * 2 >= len(start)):
        raise DataError(f"{path} is UTF-16 or UTF-32 text. Save the file as UTF-8.")


def _check_json(path: Path) -> None:
    """Parse a file line by line (or whole, when it is one JSON list), to name the line on which it breaks.

    The loader's own messages count characters or blocks, and it accepts some things that would surprise later on.
    """
    with _open(path) as file:
        start = file.read(256).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"["):
        _check_json_list(path)
        return
    rows = 0
    with _open(path) as file:
        for number, raw in enumerate(file, 1):
            line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            if line.strip():
                rows += 1
                _check_json_line(line, f"{path}, line {number}")
    if not rows:
        raise DataError(f"{path} holds only blank lines.")


def _check_json_line(line: bytes, where: str) -> None:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start + 1} of the line). Save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not valid JSON: {error.msg} at column {error.colno}. Each line must be one whole JSON object; "
            "mend or remove this line."
        ) from error
    if b"\\ud" in line.lower() and _has_lone_surrogate(row):
        raise DataError(f"{where}: half of a surrogate pair (\\ud8xx without \\udcxx): a character was cut in two.")
    if not isinstance(row, dict):
        raise DataError(f"{where}: each line must be a JSON object, this one is {type_name(row)}.")


def _has_lone_surrogate(row: Any) -> bool:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _check_json_list(path: Path) -> None:
    try:
        with _open(path) as file:
            rows = json.loads(file.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start + 1}). Save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not valid JSON: {error.msg} at column {error.colno}.") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise DataError(f"{path}: item {number} of the list must be a JSON object, it is {type_name(row)}.")


def check_columns(dataset: datasets.Dataset, source: str = "the dataset") -> None:
    """Raise DataError unless ``chosen`` and ``rejected`` are there and the columns can hold text or messages."""
    found = dataset.column_names
    missing = [name for name in ("chosen", "rejected") if name not in found]
    if missing:
        near = {name: difflib.get_close_matches(name, found, n=1, cutoff=0.75) for name in missing}
        hints = "".join(f" Is {match[0]!r} meant for {name!r}?" for name, match in near.items() if match)
        raise DataError(
            f"{source}: missing column{'s' if len(missing) > 1 else ''} {', '.join(map(repr, missing))}; found "
            f"{', '.join(map(repr, found))}. Needed: 'chosen' and 'rejected', and 'prompt' unless both begin with it "
            f"(dataset.rename_column renames).{hints}"
        )
    texts = dataset.features["chosen"]
    if "prompt" not in found and isinstance(texts, datasets.Value) and texts.dtype != "null":
        # Without a prompt column, what chosen and rejected share would be the prompt.
        near = [name for name in found if name.lower() in (*PROMPT_NAMES, "prompts", "prompt")]
        if near:
            raise DataError(
                f"{source}: no column 'prompt', but {', '.join(map(repr, near))}, which would be left out. Rename it "
                "to 'prompt', or remove it if chosen and rejected begin with the prompt."
            )
    images = [name for name in ("image", "images") if name in found]
    if images:
        raise DataError(f"{source}: column {images[0]!r} found, but only text pairs can be trained on; remove it.")
    for name in ("prompt", "chosen", "rejected"):
        if name in found and not _may_hold_text(dataset.features[name]):
            raise DataError(
                f"{source}: column {name!r} has type {dataset.features[name]}; needed: strings, or lists of messages "
                '{"role": ..., "content": ...}.'
            )


def _may_hold_text(feature: Any) -> bool:
    """Whether a column's type can be strings or messages. A column of mixed JSON is judged row by row, later."""
    if isinstance(feature, datasets.Value):
        # A column that is null throughout has type "null"; its rows are dropped and counted like any null.
        return feature.dtype in ("string", "large_string", "null")
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    if isinstance(inner, dict):
        return "role" in inner
    return "Json" in (type(feature).__name__, type(inner).__name__)


def type_name(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), f"{value!r} ({type(value).__name__})")
