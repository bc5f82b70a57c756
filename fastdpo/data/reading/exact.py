"""Columns that give back what was put in: plain Arrow types where these can, and JSON text where they cannot.

Arrow's columns have one type each. Rows of preferences do not: a content is a string here and a list of parts there,
one tool's arguments have other keys than the next one's. Made to fit, keys are added, strings are parsed and digits
lost. So a column that is not of one plain type holds, row by row, the text that ``json`` writes of the value.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import datasets
import pyarrow as pa
from datasets.features import features as feature_types

from fastdpo.data.images import IMAGE_COLUMNS, IMAGES_FEATURE, are_images, as_images
from fastdpo.data.terms import TOKEN_COLUMNS, USED_COLUMNS, DataError, type_name

_EXACT_WHOLE = 2**53  # the integers up to it are float64s, too


@dataclass
class Exact:
    """A column of JSON values of any kind. Read, a value is equal to what was written: strings that look like JSON or
    dates, integers of any size, every digit, the order of keys, and null beside absent keys."""

    id: str | None = field(default=None, repr=False)
    pa_type: ClassVar[Any] = pa.string()
    _type: str = field(default="Exact", init=False, repr=False)

    def __call__(self) -> pa.DataType:
        return self.pa_type

    def encode_example(self, value: Any) -> str | None:
        return None if value is None else _ENCODE(value)

    def decode_example(self, text: str | None, token_per_repo_id: Any = None) -> Any:
        return None if text is None else json.loads(text)

    def cast_storage(self, storage: pa.Array) -> pa.Array:
        return storage.cast(self.pa_type)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # "experimental": the one way in which a saved dataset finds its column's type
    feature_types.register_feature(Exact, "Exact")

_TYPES: dict[str, Any] = {
    "null": datasets.Value("null"),
    "text": datasets.Value("string"),
    "flag": datasets.Value("bool"),
    "whole": datasets.Value("int64"),
    "number": datasets.Value("float64"),
    "ids": datasets.List(datasets.Value("int64")),
    "images": IMAGES_FEATURE,
    "json": Exact(),
}


_COMPACT: dict[str, Any] = {"ensure_ascii": False, "separators": (",", ":")}
_ENCODE = json.JSONEncoder(**_COMPACT).encode


def kind_of(values: Sequence[Any], column: str) -> str:
    """The plainest kind that holds the values exactly, a key of ``_TYPES``; None fits all."""
    types = {type(value) for value in values} - {type(None)}
    if not types:
        return "null"
    if column in IMAGE_COLUMNS and all(map(are_images, values)):
        return "images"
    if types == {str}:
        return "text"
    if types == {bool}:
        return "flag"
    if types <= {int, float} and all(type(value) is not int or abs(value) <= _EXACT_WHOLE for value in values):
        return "number" if float in types else "whole"
    if types == {list} and column in TOKEN_COLUMNS and all(_are_ids(value) for value in values):
        return "ids"
    return "json"


def _are_ids(value: Any) -> bool:
    return value is None or all(type(item) is int and abs(item) <= _EXACT_WHOLE for item in value)


def wider(a: str, b: str) -> str:
    """The plainest kind that holds what either holds."""
    if a == b or b == "null":
        return a
    if a == "null":
        return b
    return "number" if {a, b} == {"whole", "number"} else "json"


def features_of(kinds: dict[str, str]) -> datasets.Features:
    return datasets.Features({column: _TYPES[kind] for column, kind in kinds.items()})


def to_array(values: Sequence[Any], kind: str, column: str) -> pa.Array:
    """The values as Arrow keeps a column of the kind."""
    if kind == "images":
        values = [as_images(value) for value in values]
    if kind == "json":

        def refuse(value: Any) -> Any:
            if isinstance(value, bytes):
                raise DataError(
                    f"column {column!r}: there are bytes in a message; put images into a column 'images', and leave "
                    'parts {"type": "image"} in their places.'
                )
            raise DataError(f"column {column!r}: {type_name(value)} cannot be part of a message; write it as text.")

        encode = json.JSONEncoder(default=refuse if column in USED_COLUMNS else str, **_COMPACT).encode
        values = [None if value is None else encode(value) for value in values]
    return pa.array(values, features_of({column: kind}).arrow_schema.field(column).type)


def widen(array: pa.Array, old: str, new: str, column: str) -> pa.Array:
    """What was kept as one kind, as a wider one keeps it."""
    return array if old == new else to_array(array.to_pylist(), new, column)
