"""Rows of CSV and TSV: every cell is text, as it is written; but for message lists, which programs write as code.

A table of strings has no room for a list of messages. pandas writes what Python prints of it, or numpy, and others
write JSON. A cell that is such a list, whole and as a literal, is read as one; one that begins like it and cannot be
read is refused, so that it is not learnt as text.
"""

from __future__ import annotations

import ast
import codecs
import csv
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator
from typing import Any, BinaryIO

from fastdpo.data.json_text import UNREADABLE
from fastdpo.data.reading.json_rows import refuse_half_characters
from fastdpo.data.reading.opening import DataFile
from fastdpo.data.terms import REFERENCE_COLUMNS, DataError, first_line

_BEGINS_LIKE_MESSAGES = re.compile(r"""\s*(array\(\s*)?\[?\s*\{\s*['"](role|content|from|value)['"]\s*:""")
_KEYS = ({"role"}, {"from", "value"})  # what every message has, in one spelling or the other


def csv_rows(file: DataFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of every row, the place in words.

    Raises:
        DataError: a row has too many or too few fields, a quotation mark does not end, or a cell cannot be read.
    """
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if file.format == "tsv" else ","
    with file.open() as stream:
        reader = csv.reader(_lines(stream, file), delimiter=delimiter, strict=True)
        try:
            names = next(reader, None)
            if names is None:
                raise DataError(f"{file.name} holds no line of column names.")
            _check_names(file, names)
            for cells in reader:
                if not cells:
                    continue  # a blank line
                place = f"line {reader.line_num}"
                if len(cells) != len(names):
                    raise DataError(
                        f"{file.name}, {place}: Expected {len(names)} fields ({', '.join(names)}), found {len(cells)}. "
                        "A field with a separator, a quotation mark or a line break in it needs quotation marks."
                    )
                values = map(_read_cell, cells, names, [f"{file.name}, {place}"] * len(names))
                yield place, dict(zip(names, values, strict=True))
        except csv.Error as error:
            raise DataError(f"{file.name}, line {reader.line_num}: {error}.") from error


def _lines(stream: BinaryIO, file: DataFile) -> Iterator[str]:
    for number, raw in enumerate(stream, 1):
        try:
            yield (raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw).decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file.name}, line {number}: not UTF-8 (byte {error.start + 1} of the line). Save the file as UTF-8."
            ) from error


def _check_names(file: DataFile, names: list[str]) -> None:
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise DataError(f"{file.name}: the column {repeated!r} is there twice; which of the two is meant?")


def _read_cell(cell: str, column: str, where: str) -> Any:
    if column in REFERENCE_COLUMNS:
        try:
            return float(cell)
        except ValueError as error:
            raise DataError(f"{where}, {column}: needed a number, found {cell!r}.") from error
    return read_messages(cell, f"{where}, {column}") if _BEGINS_LIKE_MESSAGES.match(cell) else cell


def read_messages(text: str, where: str) -> Any:
    """The messages of which ``text`` is what JSON, Python or numpy write.

    Raises:
        DataError: it begins like messages, and cannot be read without a guess.
    """
    try:
        value = json.loads(text)
    except UNREADABLE:
        try:
            value = _literal(text)
            if json.loads(json.dumps(value)) != value:
                raise ValueError("there is something in it that JSON has no form for")
        except (ValueError, TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError) as error:
            raise DataError(
                f"{where}: messages, written neither as JSON nor as a literal of Python ({first_line(str(error))}). "
                "It would be learnt as text; write such rows as JSON lines or Parquet."
            ) from error
    refuse_half_characters(value, where)
    messages = value if isinstance(value, list) else [value]
    if all(isinstance(m, dict) and any(keys <= m.keys() for keys in _KEYS) for m in messages):
        return value
    raise DataError(f"{where}: a list that begins like messages, of which some have no role. Mend or remove this row.")


def _literal(text: str) -> Any:
    """A literal of Python, in which numpy's arrays stand for lists; nothing is evaluated."""
    tree = ast.parse(_with_commas(text.strip()), mode="eval")
    return ast.literal_eval(_Lists().visit(tree))


def _with_commas(text: str) -> str:
    """numpy prints the items of an array of objects without commas: puts them between ``}`` and ``{``."""
    places, line_starts, before = [], [0], None
    for line in io.StringIO(text):
        line_starts.append(line_starts[-1] + len(line))
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if before == "}" and token.string == "{":
            row, column = token.start
            places.append(line_starts[row - 1] + column)
        if token.string.strip():
            before = token.string
    for place in reversed(places):
        text = f"{text[:place]}, {text[place:]}"
    return text


class _Lists(ast.NodeTransformer):
    """``array([...], dtype=object)`` → ``[...]``"""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        is_array = isinstance(node.func, ast.Name) and node.func.id == "array"
        if not is_array or len(node.args) != 1 or not isinstance(node.args[0], ast.List):
            raise ValueError("something is called in it")
        return node.args[0]
