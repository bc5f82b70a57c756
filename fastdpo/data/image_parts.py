"""Images in messages: the parts that stand for them, and the images that these parts name."""

from __future__ import annotations

from typing import Any

# A part of a message where an image stands, as chat templates know it.
IMAGE_PART = {"type": "image"}

_TYPES = ("image", "image_url", "input_image")
_KEYS = ("image", "image_url", "url", "path", "base64", "bytes")  # of a part, what says which image it is
_MARK = "<image>"


def is_image_part(part: Any) -> bool:
    if not isinstance(part, dict):
        return False
    return part.get("type") in _TYPES or ("type" not in part and any(part.get(key) for key in ("image", "image_url")))


def has_images(messages: Any) -> bool:
    """Whether a value is a message list in which an image stands."""
    return isinstance(messages, list) and any(map(has_image_part, messages))


def has_image_part(message: Any) -> bool:
    content = message.get("content") if isinstance(message, dict) else None
    return isinstance(content, list) and any(map(is_image_part, content))


def without_payloads(messages: Any) -> tuple[Any, list[Any]]:
    """Messages whose image parts are :data:`IMAGE_PART`, and the images that these named, in order; None for none."""
    if not isinstance(messages, list):
        return messages, []
    found, payloads = [], []
    for message in messages:
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, list) and any(map(is_image_part, content)):
            payloads += [payload_of(part) for part in content if is_image_part(part)]
            message = {**message, "content": [IMAGE_PART if is_image_part(part) else part for part in content]}
        found.append(message)
    return found, payloads


def payload_of(part: dict[str, Any]) -> Any:
    """The image that a part names; None where it is the next of the column's."""
    if part.get("base64") is not None:
        return f"data:image;base64,{part['base64']}"
    value = next((part[key] for key in _KEYS if part.get(key) is not None), None)
    return value.get("url") if isinstance(value, dict) and "url" in value else value


def count_parts(messages: list[dict[str, Any]]) -> int:
    """How many images stand in messages."""
    contents = [message.get("content") for message in messages]
    return sum(part == IMAGE_PART for content in contents if isinstance(content, list) for part in content)


def with_parts(messages: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Messages in which no image stands, with ``count`` of them.

    Where the user's texts have ``<image>`` as often, as LLaMA-Factory and others write it, there; where they have
    none, at the beginning of the user's first message, as TRL's ``prepare_multimodal_messages`` has them. Unchanged
    where they have another number, or no message is the user's.
    """
    asked = [i for i, message in enumerate(messages) if message.get("role") == "user"]
    parts = {i: _parts_of(messages[i]) for i in asked}
    marks = sum(_text_of(part).count(_MARK) for i in asked for part in parts[i])
    if marks == count:
        return [
            {**message, "content": [piece for part in parts[i] for piece in _split_at_marks(part)]}
            if any(_MARK in _text_of(part) for part in parts.get(i, ()))
            else message
            for i, message in enumerate(messages)
        ]
    if marks or not asked:
        return messages
    i = asked[0]
    return [*messages[:i], {**messages[i], "content": [IMAGE_PART] * count + parts[i]}, *messages[i + 1 :]]


def _parts_of(message: dict[str, Any]) -> list[Any]:
    content = message.get("content") or []
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _text_of(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    return text if isinstance(text, str) else ""


def _split_at_marks(part: Any) -> list[Any]:
    """The part, or what stands around the marks of its text, with images between."""
    if _MARK not in _text_of(part):
        return [part]
    pieces: list[Any] = []
    for number, text in enumerate(_text_of(part).split(_MARK)):
        pieces += [IMAGE_PART] if number else []
        pieces += [{**part, "text": text} if isinstance(part, dict) else text] if text else []
    return pieces
