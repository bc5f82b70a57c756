"""Which format a file is of: told by its first rows, by name, or by a function of the user's."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdpo.data.formats import (
    axolotl,
    clouds,
    compared,
    completions,
    conversations,
    exports,
    llama_factory,
    openai,
    pairs,
    ranked,
    swift,
)
from fastdpo.data.formats.base import Answers, Format, Row, Sample
from fastdpo.data.formats.names import missing_columns_message
from fastdpo.data.formats.unpaired import what_else
from fastdpo.data.terms import DataError

FORMATS: dict[str, Format] = {
    each.name: each
    for family in (
        pairs,
        openai,
        llama_factory,
        swift,
        axolotl,
        conversations,
        completions,
        ranked,
        compared,
        clouds,
        exports,
    )
    for each in family.FORMATS
}


def find_format(name: str | None, sample: Sample, source: str) -> Format:
    """The format of a file.

    Args:
        name: one of ``FORMATS``, or ``path/to/file.py:function``; None to tell it by the rows.
        sample: the file's first rows.
        source: what messages call the file.

    Raises:
        DataError: the name is not known, the rows are of several formats, of none, or no preferences.
    """
    if name is not None:
        return named_format(name)
    found = [each for each in FORMATS.values() if each.detect(sample)]
    special = [each for each in found if not each.general]
    if len(special) > 1:
        raise DataError(
            f"{source}: it could be {' or '.join(each.title for each in special)}; say which: "
            f"{' or '.join(f'--format {each.name}' for each in special)}."
        )
    if not found:
        known = what_else(sample)
        if known is not None:
            raise DataError(f"{source}: these are {known}.")
        raise DataError(missing_columns_message(list(sample.columns), source))
    return (special or found)[0]


def named_format(name: str) -> Format:
    """The format that ``--format`` names.

    Raises:
        DataError: there is none of the name, or the function cannot be had.
    """
    if name in FORMATS:
        return FORMATS[name]
    if ":" in name:
        return _from_function(name)
    raise DataError(
        f"--format {name}: no such format; there are {', '.join(sorted(FORMATS))}, and path/to/file.py:function for "
        "one of your own."
    )


def _from_function(name: str) -> Format:
    path, _, function_name = name.rpartition(":")
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"--format {name}: no such file: {file}.")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise DataError(f"--format {name}: {file} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise DataError(f"--format {name}: {file} has no function {function_name!r}.")

    def convert(row: Row) -> Any:
        made = function(row)
        rows = [] if made is None else [made] if isinstance(made, (dict, Answers)) else list(made)
        for new in rows:
            if not isinstance(new, Answers) and not {"chosen", "rejected"} <= new.keys():
                raise DataError(f"{function_name} should return 'chosen' and 'rejected', it returned {', '.join(new)}")
        return rows

    return Format(
        name=name,
        title=f"{function_name} of {file.name}",
        source=str(file),
        reads=None,
        detect=lambda sample: False,
        convert=convert,
    )


def definition_of(name: str | None) -> Any:
    """What the rows depend on beside the file and fastdpo's version: the text of the user's function."""
    if name is None or name in FORMATS or ":" not in name:
        return name
    file = Path(name.rpartition(":")[0]).expanduser()
    return [name, file.read_text(encoding="utf-8")] if file.is_file() else name


def rename(row: Row, columns: Mapping[str, str], where: str) -> Row:
    """The row with columns of other names: ``columns`` says new name → name in the file.

    Raises:
        DataError: a column is not there.
    """
    taken = set(columns.values())
    missing = [name for name in taken if name not in row]
    if missing:
        raise DataError(
            f"{where}: --columns names {missing[0]!r}, and there is no such column; found {', '.join(row)}."
        )
    return {key: value for key, value in row.items() if key not in taken and key not in columns} | {
        new: row[old] for new, old in columns.items()
    }
