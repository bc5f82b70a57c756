"""Images as files: their bytes, what these show, and whether they have changed."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import datasets
from PIL import Image

from fastdpo.data.terms import DataError, first_line, type_name

REMOTE = ("http://", "https://", "ftp://", "s3://", "gs://", "hf://")
INLINE = "data:"


class UnreadableImageError(Exception):
    """An image of one row cannot be had; the message says why."""


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
    if value.startswith(REMOTE):
        raise DataError(
            f"{where}: the image {value} would have to be fetched, which training does not do; download the images, "
            "and name their files."
        )
    if value.startswith(INLINE):
        try:
            return base64.b64decode(value.partition(",")[2], validate=True)
        except ValueError as error:  # binascii.Error, or letters beyond ASCII
            raise UnreadableImageError(f"a data: URL is no base64 ({error})") from error
    try:
        return Path(value).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(str(error))
        raise UnreadableImageError(f"{value}: {reason}") from error


def decode_image(data: bytes) -> Image.Image:
    """The image that a file's bytes are, upright, as ``datasets.Image`` decodes it.

    Raises:
        UnreadableImageError: they are none, or its values do not fit the 8 bits that processors make of them.
    """
    try:
        with Image.open(io.BytesIO(data)) as probe:
            probe.verify()
        image: Image.Image = datasets.Image().decode_example({"bytes": data, "path": None})
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UnreadableImageError(first_line(str(error))) from error
    if image.mode == "F" or image.mode.startswith("I"):
        low, high = cast(tuple[float, float], image.getextrema())
        # PIL cuts at 0 and 255: grey values of 16 bits would all be white, and those from 0 to 1 black.
        if image.mode == "F" or low < 0 or high > 255:
            raise UnreadableImageError(
                f"its values are from {low:g} to {high:g} (mode {image.mode}), which would be cut at 0 and 255; save "
                "it with 8 bits a value"
            )
    return image


def digest_of_images(images: Iterable[bytes]) -> str:
    """A name for these images in this order, of 32 hex digits; "" for none."""
    digest, count = hashlib.blake2b(digest_size=16), 0
    for data in images:
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
        count += 1
    return digest.hexdigest() if count else ""
