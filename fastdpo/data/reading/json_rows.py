"""Rows of JSON: a line each, or one list; every value as it is written.

The standard library's parser, because it is exact: integers of any size, the float64 nearest to what is written, and
NaN; faster ones round or refuse these. A key that is there twice in an object has two values, and is refused.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any

from fastdpo.data.json_text import UNREADABLE, what_is_wrong
from fastdpo.data.reading.opening import DataFile
from fastdpo.data.terms import DataError, type_name

_CHUNK = 1 << 20  # bytes of a list that are looked at at a time
_BLANK = " \t\r\n"


class _RepeatedKeyError(ValueError):
    """An object has a key twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _RepeatedKeyError(next(key for key in keys if keys.count(key) > 1))
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def json_rows(file: DataFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of every row, the place in words.

    Raises:
        DataError: something is not JSON, or not an object; the message names the line.
    """
    with file.open() as stream:
        start = stream.read(256).removeprefix(codecs.BOM_UTF8).lstrip()
    rows = _list_rows(file) if start.startswith(b"[") else _line_rows(file)
    for place, row in rows:
        if not isinstance(row, dict):
            what = "each line must be" if place.startswith("line") else "each item of the list must be"
            raise DataError(f"{file.name}, {place}: {what} a JSON object, this one is {type_name(row)}.")
        yield place, row


def _line_rows(file: DataFile) -> Iterator[tuple[str, Any]]:
    empty = True
    with file.open() as stream:
        for number, raw in enumerate(stream, 1):
            line = raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw
            if line.strip():
                empty = False
                yield f"line {number}", _parse_line(line, f"{file.name}, line {number}")
    if empty:
        raise DataError(f"{file.name} holds only blank lines.")


def _parse_line(line: bytes, where: str) -> Any:
    try:
        row = _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start + 1} of the line). Save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not valid JSON: {error.msg} at column {error.colno}. Each line must be one whole JSON object; "
            "mend or remove this line."
        ) from error
    except _RepeatedKeyError as error:
        raise DataError(_twice(where, error)) from error
    except UNREADABLE as error:
        raise DataError(f"{where}: {what_is_wrong(error)}.") from error
    if b"\\ud" in line.lower():
        refuse_half_characters(row, where)
    return row


def _twice(where: str, error: _RepeatedKeyError) -> str:
    return f"{where}: the key {str(error)!r} is specified twice in one object; which of the values is meant?"


def refuse_half_characters(row: Any, where: str) -> None:
    """Raise DataError for text that JSON can escape, and UTF-8 has no form for."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: half of a surrogate pair (\\ud8xx without \\udcxx): a character was cut in two."
        ) from error


def _list_rows(file: DataFile) -> Iterator[tuple[str, Any]]:
    """The items of one list, as the file is read; what is in memory is one item and a chunk."""
    with file.open() as stream:
        text = _Text(file, stream)
        text.skip("[")
        number = 0
        while not text.at("]"):
            if number:
                text.skip(",")
            place = f"item {number}"
            row = text.value()
            refuse_half_characters(row, f"{file.name}, {place}")
            yield place, row
            number += 1
        text.skip("]")
        text.expect_end()
    if not number:
        raise DataError(f"{file.name} holds an empty list.")


class _Text:
    """Text that comes in chunks, parsed from its beginning."""

    def __init__(self, file: DataFile, stream: Any):
        self._name, self._stream = file.name, stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text, self._start, self._line, self._ended = "", 0, 1, False

    def skip(self, char: str) -> None:
        if not self.at(char):
            raise self._error(f"Expecting {char!r}", self._start)
        self._start += 1

    def at(self, char: str) -> bool:
        """Whether this is what comes next, after white space."""
        while True:
            while self._start < len(self._text) and self._text[self._start] in _BLANK:
                self._start += 1
            if self._start < len(self._text):
                return self._text[self._start] == char
            if self._ended:
                return False
            self._read(_CHUNK)

    def expect_end(self) -> None:
        if not self.at("") and self._start < len(self._text):
            raise self._error("Extra data", self._start)

    def value(self) -> Any:
        self.at("")  # past white space
        size = _CHUNK
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._start)
            except _RepeatedKeyError as error:
                raise DataError(_twice(f"{self._name}, line {self._line_of(self._start)}", error)) from error
            except json.JSONDecodeError as error:
                if self._ended:
                    raise self._error(error.msg, error.pos) from error
            except UNREADABLE as error:
                where = f"{self._name}, line {self._line_of(self._start)}"
                raise DataError(f"{where}: {what_is_wrong(error)}.") from error
            else:
                if end < len(self._text) or self._ended:  # a number could go on
                    self._start = end
                    return value
            self._read(size)
            size *= 2  # so that an item of many chunks is not parsed many times

    def _read(self, size: int) -> None:
        raw = self._stream.read(size)
        self._ended = not raw
        self._line += self._text.count("\n", 0, self._start)
        try:
            self._text = self._text[self._start :] + self._decoder.decode(raw, final=self._ended)
        except UnicodeDecodeError as error:
            raise DataError(f"{self._name}: not UTF-8 ({error.reason}). Save the file as UTF-8.") from error
        self._start = 0

    def _line_of(self, position: int) -> int:
        return self._line + self._text.count("\n", 0, position)

    def _error(self, what: str, position: int) -> DataError:
        column = position - self._text.rfind("\n", 0, position)
        return DataError(f"{self._name}, line {self._line_of(position)}: not valid JSON: {what} at column {column}.")
