"""What a format is: how its files are known, and what a row of it becomes.

A row becomes a pair, in the columns ``prompt`` (not where the answers begin with it), ``chosen``, ``rejected`` and
``tools``; or :class:`Answers`, several to one prompt and how good each is, of which pairs are made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastdpo.data.terms import DataError, type_name

Row = dict[str, Any]


@dataclass
class Answers:
    """Answers to one prompt.

    Attributes:
        prompt: text, or messages.
        answers: texts, or message lists.
        scores: how good each is; the greater the better.
        more: other columns of the row, as ``tools``.
    """

    prompt: Any
    answers: list[Any]
    scores: list[float]
    more: Row = field(default_factory=dict)


@dataclass(frozen=True)
class LeftOut:
    """A row of which no pair can be made, and that is no mistake: a tie, a task that nobody finished."""

    why: str


class Sample:
    """What the first rows of a file have.

    Attributes:
        columns: the keys of any of them, in order.
    """

    def __init__(self, rows: Sequence[Row]):
        self.columns = {key: None for row in rows for key in row}.keys()
        self._first: Row = {}
        for row in rows:
            for key, value in row.items():
                if key not in self._first or self._first[key] is None:
                    self._first[key] = value

    def __getitem__(self, column: str) -> Any:
        """The first value of the column that is not null; None where it has none, or is not there."""
        return self._first.get(column)

    def has(self, *columns: str) -> bool:
        return all(column in self.columns for column in columns)

    def texts(self, *columns: str) -> bool:
        """Whether the columns are there, and hold text."""
        return all(isinstance(self[column], str) for column in columns)

    def messages(self, *columns: str) -> bool:
        """Whether the columns are there, and hold messages: a list of them, or one."""
        return all(is_message_list(self[column]) or isinstance(self[column], dict) for column in columns)


Convert = Callable[[Row], "Row | Answers | LeftOut | Iterable[Row]"]


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: what ``--format`` calls it.
        title: what the summary calls it.
        source: where it is described.
        reads: the columns that ``convert`` makes use of; the others stay as they are. None where which these are
            depends on the row; no other stays.
        detect: whether a file is of this format.
        convert: what a row says. Raises DataError, or what looking for the missing raises, for a row that is not of
            the format.
        gather: joins rows that belong together before they are converted, where the format spreads them.
        general: whether it gives way to any other format that a file is of, too.
    """

    name: str
    title: str
    source: str
    reads: tuple[str, ...] | None
    detect: Callable[[Sample], bool]
    convert: Convert
    gather: Callable[[Iterator[tuple[str, Row]]], Iterator[tuple[str, Row]]] | None = None
    general: bool = False


def is_message_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def number(row: Mapping[str, Any], key: str) -> float:
    """The number under ``key``, which tables of text write as text.

    Raises:
        DataError: there is none.
    """
    value: Any = row.get(key)
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{key!r} should be a number, found {type_name(value)}") from error


def text(row: Mapping[str, Any], key: str) -> str:
    """The text under ``key``.

    Raises:
        DataError: there is none.
    """
    value = row.get(key)
    if not isinstance(value, str):
        raise DataError(f"{key!r} should be a string, found {type_name(value)}")
    return value
