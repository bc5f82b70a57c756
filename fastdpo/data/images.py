"""Images of preference rows: the columns that have them.

A row has its images in a column ``images`` (a list) or ``image`` (one), or in the parts of its messages. Each is a
path, bytes, ``{"bytes": ..., "path": ...}`` as ``datasets.Image`` keeps it, a ``data:`` URL, or a PIL image.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from fastdpo.data.image_files import INLINE, REMOTE
from fastdpo.data.image_parts import has_image_part, has_images, is_image_part, payload_of
from fastdpo.data.terms import DataError, type_name

IMAGE_COLUMNS = ("images", "image")
# How a column keeps images that were read from files, whatever these had.
IMAGES_FEATURE = datasets.List({"bytes": datasets.Value("binary"), "path": datasets.Value("string")})


def column_images(row: dict[str, Any], where: str) -> list[Any]:
    """The images of a row's columns, not read yet.

    Raises:
        DataError: both columns have some, or one has something else.
    """
    found: list[Any] = []
    for name in IMAGE_COLUMNS:
        value = row.get(name)
        if value is None or value == "" or (isinstance(value, (list, dict)) and not _holds(value)):
            continue
        if found:
            raise DataError(f"{where}: both of the columns {' and '.join(map(repr, IMAGE_COLUMNS))} hold images.")
        found = list(value) if isinstance(value, (list, tuple)) else [value]
    for value in found:
        if not isinstance(value, (str, bytes, dict, Image.Image)):
            raise DataError(
                f"{where}: needed an image (a path, bytes, or what datasets.Image gives), found {type_name(value)}."
            )
    return found


def _holds(value: list[Any] | dict[str, Any]) -> bool:
    """Whether a column's value has any image."""
    if isinstance(value, dict):
        return any(value.get(key) for key in ("bytes", "path"))
    return any(item is not None for item in value)


def undecoded(dataset: datasets.Dataset) -> datasets.Dataset:
    """The dataset with the images of its columns as bytes and paths: they are decoded where they are needed."""
    features = dataset.features.copy()
    for name in IMAGE_COLUMNS:
        feature = features.get(name)
        if isinstance(feature, datasets.Image):
            features[name] = datasets.Image(decode=False)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            features[name] = type(feature)(datasets.Image(decode=False))
    if features == dataset.features:
        return dataset
    info = dataset.info.copy()
    info.features = features
    # The same table: cast_column would copy the images of lists.
    return datasets.Dataset(
        dataset.data,
        info=info,
        split=dataset.split,
        indices_table=dataset._indices,
        fingerprint=f"{dataset._fingerprint}-undecoded",
    )


def undecoded_stream(rows: datasets.IterableDataset) -> datasets.IterableDataset:
    """The same of a stream, where it says what its columns are; others have what they have."""
    return rows if rows.features is None else rows.decode(False)


def without_pictures(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose columns have the files' bytes in the place of PIL images: what a buffer can hold many of."""
    found = {name: row[name] for name in IMAGE_COLUMNS if row.get(name)}
    return row | {name: _encoded(value) for name, value in found.items()}


def _encoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_encoded(item) for item in value]
    return datasets.Image().encode_example(value) if isinstance(value, Image.Image) else value


def are_images(value: Any) -> bool:
    """Whether :data:`IMAGES_FEATURE` can keep a column's value."""
    values = value if isinstance(value, list) else [value]
    return all(
        item is None or isinstance(item, (str, bytes)) or (isinstance(item, dict) and item.keys() <= {"bytes", "path"})
        for item in values
    )


def as_images(value: Any) -> list[dict[str, Any]] | None:
    """A column's value as :data:`IMAGES_FEATURE` keeps it."""
    if value is None or value == "":
        return None
    return [_as_struct(item) for item in (value if isinstance(value, list) else [value]) if item is not None]


def _as_struct(item: Any) -> dict[str, Any]:
    if isinstance(item, dict):
        inner = item.get("bytes")
        return {"bytes": inner.encode() if isinstance(inner, str) else inner, "path": item.get("path")}
    return {"bytes": item, "path": None} if isinstance(item, bytes) else {"bytes": None, "path": item}


def has_image_parts(dataset: datasets.Dataset, name: str) -> bool:
    """Whether an image stands in the messages of any row's column."""
    feature, column = dataset.features[name], dataset.select_columns([name])
    if getattr(feature, "pa_type", None) == pa.string() and not isinstance(feature, datasets.Value):  # text of JSON
        # Parsed is only what may be one: most sets have none.
        texts = (table.column(name) for table in column.with_format("arrow").iter(batch_size=1000))
        found = (text for batch in texts for text in batch.filter(pc.match_substring(batch, "image")).to_pylist())
        return any(has_images(json.loads(text)) for text in found)
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    is_list = isinstance(inner, dict) and not isinstance(inner.get("content"), (datasets.Value, type(None)))
    if not is_list and "Json" not in (type(feature).__name__, type(inner).__name__):
        return False
    return any(has_images(value) for batch in column.iter(batch_size=1000) for value in batch[name])


def state_of_files(dataset: datasets.Dataset) -> str:
    """What tells whether the files that rows name have changed: these files' sizes and times, as hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    names = [name for name in IMAGE_COLUMNS if name in dataset.column_names]
    sides = [name for name in ("prompt", "chosen", "rejected") if name in dataset.column_names]
    if any(has_image_parts(dataset, name) for name in sides):
        names += sides
    for batch in dataset.select_columns(names).iter(batch_size=1000) if names else ():
        for path in _paths(list(batch.values())):
            try:
                state = os.stat(path)
                digest.update(f"{path} {state.st_size} {state.st_mtime_ns}\n".encode())
            except (OSError, ValueError):
                digest.update(f"{path} -\n".encode())
    return digest.hexdigest()


def _paths(value: Any) -> Iterable[str]:
    """Of columns, images and messages."""
    if isinstance(value, list):
        for item in value:
            yield from _paths(item)
    elif has_image_part(value):
        yield from _paths([payload_of(part) for part in value["content"] if is_image_part(part)])
    elif isinstance(value, dict):
        if isinstance(value.get("path"), str) and value.get("bytes") is None:
            yield from _paths(value["path"])
    elif isinstance(value, str) and not value.startswith((INLINE, *REMOTE)):
        yield value


def resolved(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A row of a file whose images' paths are from the file's folder on; the same object where it has none."""
    changed = {name: _resolved(row[name], folder) for name in IMAGE_COLUMNS if row.get(name)}
    for name, value in row.items():
        if has_images(value):
            changed[name] = [_with_resolved_parts(message, folder) for message in value]
    changed = {name: value for name, value in changed.items() if value != row[name]}
    return row | changed if changed else row


def _with_resolved_parts(message: Any, folder: Path) -> Any:
    if not has_image_part(message):
        return message
    parts = [_resolved_part(part, folder) if is_image_part(part) else part for part in message["content"]]
    return {**message, "content": parts}


def _resolved_part(part: dict[str, Any], folder: Path) -> dict[str, Any]:
    named = ("image", "image_url", "url", "path")
    return {key: _resolved(value, folder) if key in named else value for key, value in part.items()}


def _resolved(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_resolved(item, folder) for item in value]
    if isinstance(value, dict):
        named = () if value.get("bytes") is not None else ("path", "url")
        return {key: _resolved(inner, folder) if key in named else inner for key, inner in value.items()}
    if not isinstance(value, str) or not value or value.startswith((INLINE, *REMOTE)):
        return value
    # Unlike Path.expanduser, os.path's leaves the name of a home that there is not as it is.
    return str(folder / os.path.expanduser(value.removeprefix("file://")))
