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
