"""Other forms of the same messages, for templates that know one form alone. None loses anything."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

from fastdpo.data.claims import calls_of
from fastdpo.data.image_parts import IMAGE_PART
from fastdpo.data.json_text import UNREADABLE
from fastdpo.data.mask import squeeze
from fastdpo.data.templates import Messages


def forms_for(messages: Messages) -> Iterator[tuple[str, ...]]:
    """Names of forms that would change something, the fewest first; as they are, before all."""
    names = [name for name, (suits, _) in _FORMS.items() if any(map(suits, messages))]
    for count in range(4):
        yield from combinations(names, count)


def in_form(messages: Messages, forms: tuple[str, ...]) -> Messages:
    """The messages in these forms, those that need no other as they are."""
    for name in forms:
        suits, change = _FORMS[name]
        messages = [change(message) if suits(message) else message for message in messages]
    return messages


def parse_arguments(text: str) -> dict[str, Any] | None:
    """The object that JSON text says; None if it is none, or would not be written as it was."""
    try:
        value = json.loads(text)
    except UNREADABLE:
        return None
    if not isinstance(value, dict):
        return None
    written = {squeeze(json.dumps(value, ensure_ascii=plain)) for plain in (False, True)}
    return value if squeeze(text) in written else None


def _with_calls(message: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    def changed(call: dict[str, Any]) -> dict[str, Any]:
        inner = call.get("function")
        if isinstance(inner, dict):
            return {**call, "function": {**inner, "arguments": change(inner.get("arguments"))}}
        return {**call, "arguments": change(call.get("arguments"))}

    return {**message, "tool_calls": [changed(call) for call in message["tool_calls"]]}


def _has_calls(message: dict[str, Any], kind: type) -> bool:
    return "tool_calls" in message and any(isinstance(call.get("arguments"), kind) for call in calls_of(message))


def _parsed(arguments: Any) -> Any:
    value = parse_arguments(arguments) if isinstance(arguments, str) else None
    return arguments if value is None else value


def _written(arguments: Any) -> Any:
    return json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments


def _joined(message: dict[str, Any]) -> dict[str, Any]:
    parts = [part if isinstance(part, str) else part["text"] for part in message["content"]]
    return {**message, "content": "".join(parts)}


# name -> (which messages it changes, how). The order is that in which several are applied.
_FORMS: dict[str, tuple[Callable[[dict[str, Any]], bool], Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "arguments_parsed": (lambda m: _has_calls(m, str), lambda m: _with_calls(m, _parsed)),
    "arguments_written": (lambda m: _has_calls(m, dict), lambda m: _with_calls(m, _written)),
    "content_filled": (lambda m: "content" not in m, lambda m: {**m, "content": ""}),
    "parts_joined": (lambda m: isinstance(m.get("content"), list) and IMAGE_PART not in m["content"], _joined),
    "parts_made": (
        lambda m: isinstance(m.get("content"), str),
        lambda m: {**m, "content": [{"type": "text", "text": m["content"]}]},
    ),
}
