"""Rows of a file → rows of pairs, by the file's format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain, islice
from typing import Any

from fastdpo.data.formats.base import Answers, Format, LeftOut, Row, Sample
from fastdpo.data.formats.completions import group_of
from fastdpo.data.formats.pairs import pairs_of
from fastdpo.data.formats.registry import find_format, rename
from fastdpo.data.terms import REFERENCE_COLUMNS, DataError, first_line, is_prepared

_LOOKED_AT = 100  # rows by which the format is told
# What a row that is not of its format may raise, wherever a format looks for what it has not.
_ROW_ERRORS = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    StopIteration,
    TypeError,
    ValueError,
)
_TIES = "two answers score alike"


def convert(
    rows: Iterator[tuple[str, Row]],
    source: str,
    *,
    format: str | None,
    columns: Mapping[str, str] | None,
    groups: bool = False,
    facts: list[dict[str, Any]],
) -> Iterator[Row]:
    """The pairs that the rows are, in columns of fastdpo's own names.

    Args:
        rows: (place, row) of each.
        source: what messages call the file.
        format: its format's name, or a function's; None to tell it by the rows.
        columns: new name → name in the file, where columns are called otherwise.
        groups: whether several answers to a prompt stay one row, in a group's columns; otherwise they become pairs of
            neighbours in the order of their scores. (Rows in these columns stay one row in any case.)
        facts: gets what became of the file, when all of it is read: ``title`` of the format, ``rows``, ``pairs``, and
            ``left_out``, reason → count.

    Raises:
        DataError: the format cannot be told, or a row is not of it.
    """
    if columns:
        rows = ((place, rename(row, columns, f"{source}, {place}")) for place, row in rows)
        format = format or "trl"
    first = list(islice(rows, _LOOKED_AT))
    sample = Sample([row for _, row in first])
    rows = chain(first, rows)
    del first
    if is_prepared(sample.columns):  # made by prepare
        yield from (row for _, row in rows)
        facts.append({"title": None, "left_out": {}})
        return
    found = find_format(format, sample, source)
    left_out: Counter[str] = Counter()
    for place, row in _gathered(found, rows, source) if found.gather else rows:
        yield from _pairs(found, row, f"{source}, {place}", groups, left_out)
    facts.append({"title": found.title, "left_out": dict(left_out)})


def _gathered(found: Format, rows: Iterator[tuple[str, Row]], source: str) -> Iterator[tuple[str, Row]]:
    assert found.gather is not None
    try:
        yield from found.gather(rows)
    except DataError as error:  # which begins with the row's place
        raise DataError(f"{source}, {error}") from error
    except _ROW_ERRORS as error:
        raise _other_format(source, found, error) from error


def _other_format(where: str, found: Format, error: Exception) -> DataError:
    what = f"it has no {error}" if isinstance(error, KeyError) else first_line(str(error) or type(error).__name__)
    return DataError(
        f"{where}: the row is not of the format that the file is read as, {found.title} ({what}). Mend or remove "
        "it, or name the format of the file: --format."
    )


def _pairs(found: Format, row: Row, where: str, groups: bool, left_out: Counter[str]) -> Iterator[Row]:
    try:
        made = found.convert(row)
        if isinstance(made, LeftOut):
            left_out[made.why] += 1
            return
        new_rows: list[Row] = []
        for each in [made] if isinstance(made, (dict, Answers)) else made:
            if isinstance(each, Answers) and groups:
                new_rows.append(group_of(each))
            elif isinstance(each, Answers):
                some, ties = pairs_of(each)
                left_out.update({_TIES: ties} if ties else {})
                new_rows += some
            else:
                new_rows.append(each)
    except DataError as error:
        raise DataError(f"{where}, read as {found.title}: {str(error).rstrip('.')}.") from error
    except _ROW_ERRORS as error:
        raise _other_format(where, found, error) from error
    if found.reads is None:
        kept = {name: row[name] for name in REFERENCE_COLUMNS if name in row}
    else:
        kept = {name: value for name, value in row.items() if name not in found.reads}
    for new in new_rows:
        yield new | {name: value for name, value in kept.items() if name not in new}


def read_as(facts: list[dict[str, Any]], names: list[str]) -> str:
    """A line for people: which format each file was read as, and what was left out of it."""
    lines: dict[str, list[str]] = {}
    for fact, name in zip(facts, names, strict=True):
        if fact["title"] is None:
            continue
        counts = "".join(f"; left out {count}: {why}" for why, count in fact["left_out"].items())
        lines.setdefault(f"{fact['title']}{counts}", []).append(name)
    if len(lines) == 1:
        return next(iter(lines))
    return "; ".join(f"{_some(names)} as {line}" for line, names in lines.items())


def _some(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]} and {len(names) - 1} more"
