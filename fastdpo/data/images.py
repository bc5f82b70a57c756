"""Images of preference rows: where a row has them, and their bytes.

A row has its images in a column ``images`` (a list) or ``image`` (one), or in the parts of its messages. Each is a
path, bytes, ``{"bytes": ..., "path": ...}`` as ``datasets.Image`` keeps it, a ``data:`` URL, or a PIL image.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from fastdpo.data.terms import DataError, first_line, type_name

IMAGE_COLUMNS = ("images", "image")
# A part of a message where an image stands, as chat templates know it.
IMAGE_PART = {"type": "image"}
# How a column keeps images that were read from files, whatever these had.
IMAGES_FEATURE = datasets.List({"bytes": datasets.Value("binary"), "path": datasets.Value("string")})

_TYPES = ("image", "image_url", "input_image")
_KEYS = ("image", "image_url", "url", "path", "base64", "bytes")  # of a part, what says which image it is
_REMOTE = ("http://", "https://", "ftp://", "s3://", "gs://", "hf://")
_INLINE = "data:"
_MARK = "<image>"
_LOOKED_AT = 100  # rows


class UnreadableImageError(Exception):
    """An image of one row cannot be had; the message says why."""


# --------------------------------------------------------------------------------------------------------------------
# Columns
# --------------------------------------------------------------------------------------------------------------------


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
            features[name] = datasets.List(datasets.Image(decode=False))
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


def may_have_images(dataset: datasets.Dataset | datasets.IterableDataset) -> bool:
    """Whether rows have images, as far as columns and the first rows tell."""
    if isinstance(dataset, datasets.Dataset):
        first = undecoded(dataset).select(range(min(len(dataset), _LOOKED_AT)))
        names = first.column_names
    else:
        first, names = list(dataset.take(1)), None  # more would fill its shuffling buffer
    for row in first:
        if any(row.get(name) is not None for name in IMAGE_COLUMNS):
            return True
        if any(map(has_images, row.values())):
            return True
    columns = [name for name in IMAGE_COLUMNS if names and name in names]
    return any(dataset.data.column(name).null_count < len(dataset.data) for name in columns)


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


def state_of_files(dataset: datasets.Dataset) -> str:
    """What tells whether the files that a dataset's columns name have changed: their sizes and times, as hex digits."""
    digest = hashlib.blake2b(digest_size=16)
    names = [name for name in IMAGE_COLUMNS if name in dataset.column_names]
    for batch in dataset.select_columns(names).iter(batch_size=1000) if names else ():
        for name in names:
            for path in _paths(batch[name]):
                try:
                    state = os.stat(path)
                    digest.update(f"{path} {state.st_size} {state.st_mtime_ns}\n".encode())
                except OSError:
                    digest.update(f"{path} -\n".encode())
    return digest.hexdigest()


def _paths(value: Any) -> Iterable[str]:
    if isinstance(value, str) and not value.startswith((_INLINE, *_REMOTE)):
        yield value
    elif isinstance(value, dict) and value.get("path") and value.get("bytes") is None:
        yield value["path"]
    elif isinstance(value, list):
        for item in value:
            yield from _paths(item)


# --------------------------------------------------------------------------------------------------------------------
# Parts of messages
# --------------------------------------------------------------------------------------------------------------------


def is_image_part(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    return part.get("type") in _TYPES or ("type" not in part and any(part.get(key) for key in ("image", "image_url")))


def without_payloads(messages: Any) -> tuple[Any, list[Any]]:
    """Messages whose image parts are :data:`IMAGE_PART`, and the images that these named, in order; None for none."""
    if not isinstance(messages, list):
        return messages, []
    found, payloads = [], []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and any(map(is_image_part, content)):
            payloads += [_payload(part) for part in content if is_image_part(part)]
            message = {**message, "content": [IMAGE_PART if is_image_part(part) else part for part in content]}
        found.append(message)
    return found, payloads


def _payload(part: dict[str, Any]) -> Any:
    """The image that a part names; None where it is the next of the column's."""
    if part.get("base64") is not None:
        return f"{_INLINE}image;base64,{part['base64']}"
    value = next((part[key] for key in _KEYS if part.get(key) is not None), None)
    return value.get("url") if isinstance(value, dict) and "url" in value else value


def count_parts(messages: list[dict[str, Any]]) -> int:
    """How many images stand in messages."""
    contents = [message.get("content") for message in messages]
    return sum(part == IMAGE_PART for content in contents if isinstance(content, list) for part in content)


def with_parts(messages: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Messages in which no image stands, with ``count`` of them.

    Where the user's texts have ``<image>`` as often, as LLaMA-Factory and others write it, there; else at the beginning
    of the user's first message, as TRL's ``prepare_multimodal_messages`` has them. Unchanged where no message is the
    user's.
    """
    asked = [m["content"] for m in messages if m.get("role") == "user" and isinstance(m.get("content"), str)]
    if sum(text.count(_MARK) for text in asked) == count:
        return [_split_at_marks(message) if message.get("role") == "user" else message for message in messages]
    for i, message in enumerate(messages):
        if message.get("role") == "user":
            content = message.get("content") or []
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            first = {**message, "content": [IMAGE_PART] * count + parts}
            return [*messages[:i], first, *messages[i + 1 :]]
    return messages


def _split_at_marks(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, str) or _MARK not in content:
        return message
    parts: list[dict[str, Any]] = []
    for number, text in enumerate(content.split(_MARK)):
        parts += [IMAGE_PART] if number else []
        parts += [{"type": "text", "text": text}] if text else []
    return {**message, "content": parts}


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


def resolved(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A row of a file whose images' paths are from the file's folder on; the same object where it has none."""
    changed = {name: _resolved(row[name], folder) for name in IMAGE_COLUMNS if row.get(name)}
    for name, value in row.items():
        if has_images(value):
            changed[name] = [_with_resolved_parts(message, folder) for message in value]
    changed = {name: value for name, value in changed.items() if value != row[name]}
    return row | changed if changed else row


def has_images(messages: Any) -> bool:
    """Whether a value is a message list in which an image stands."""
    return isinstance(messages, list) and any(map(_has_image_part, messages))


def _has_image_part(message: Any) -> bool:
    content = message.get("content") if isinstance(message, dict) else None
    return isinstance(content, list) and any(map(is_image_part, content))


def _with_resolved_parts(message: Any, folder: Path) -> Any:
    if not _has_image_part(message):
        return message
    parts = [_resolved_part(part, folder) if is_image_part(part) else part for part in message["content"]]
    return {**message, "content": parts}


def _resolved_part(part: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {key: _resolved(value, folder) if key in ("image", "url", "path") else value for key, value in part.items()}


def _resolved(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [_resolved(item, folder) for item in value]
    if isinstance(value, dict):
        given = value.get("bytes") is None and "path" in value
        return {**value, "path": _resolved(value["path"], folder)} if given else value
    if not isinstance(value, str) or not value or value.startswith((_INLINE, *_REMOTE)):
        return value
    return str(folder / Path(value.removeprefix("file://")).expanduser())


def read_image(value: Any, where: str) -> bytes:
    """The bytes of an image's file.

    Raises:
        DataError: it is somewhere else than here.
        UnreadableImageError: it cannot be read.
    """
    if isinstance(value, Image.Image):
        encoded: bytes = datasets.Image().encode_example(value)["bytes"]
        return encoded
    if isinstance(value, dict):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        return value
    if not isinstance(value, str):
        raise UnreadableImageError(f"there is {type_name(value)} where an image should be")
    if value.startswith(_REMOTE):
        raise DataError(
            f"{where}: the image {value} would have to be fetched, which training does not do; download the images, "
            "and name their files."
        )
    if value.startswith(_INLINE):
        try:
            return base64.b64decode(value.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise UnreadableImageError(f"a data: URL is no base64 ({error})") from error
    try:
        return Path(value).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(str(error))
        raise UnreadableImageError(f"{value}: {reason}") from error


def decode_image(data: bytes) -> Image.Image:
    """The image that a file's bytes are, upright, as ``datasets.Image`` decodes it.

    Raises:
        UnreadableImageError: they are none.
    """
    try:
        with Image.open(io.BytesIO(data)) as probe:
            probe.verify()
        image: Image.Image = datasets.Image().decode_example({"bytes": data, "path": None})
        return image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(first_line(str(error))) from error


def digest_of_images(images: Iterable[bytes]) -> str:
    """A name for these images in this order, of 32 hex digits; "" for none."""
    digest, count = hashlib.blake2b(digest_size=16), 0
    for data in images:
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
        count += 1
    return digest.hexdigest() if count else ""
