"""Messages in the spellings of the field → ``{"role": ..., "content": ...}``, as chat templates read them."""

from __future__ import annotations

import json
from typing import Any

from fastdpo.data.formats.base import Row, is_message_list
from fastdpo.data.json_text import UNREADABLE, what_is_wrong
from fastdpo.data.terms import DataError, type_name

# ShareGPT's "from" → the role; what calls a tool and what a tool answers are messages of their own there.
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "function_call": "tool_call",
    "observation": "tool",
    "tool": "tool",
    "tool_call": "tool_call",
    "tool_response": "tool",
}


def user(content: Any) -> Row:
    return {"role": "user", "content": content}


def assistant(content: Any) -> Row:
    return {"role": "assistant", "content": content}


def system_first(system: Any, messages: list[Row]) -> list[Row]:
    """The messages with a system message in front, where there is a text for it and none is there."""
    if not system:
        return messages
    if not isinstance(system, str):
        raise DataError(f"'system' should be a string, found {type_name(system)}")
    first = messages[0] if messages else {}
    if isinstance(first, dict) and first.get("role") == "system":
        if first.get("content") == system:
            return messages
        raise DataError("the column 'system' and the first message say different things to the system; remove one")
    return [{"role": "system", "content": system}, *messages]


def as_messages(value: Any) -> Any:
    """One message, or a list in either spelling, as a list with roles; other values as they are."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = [value]
    if (
        is_message_list(value)
        and "from" in value[0]
        and all("from" in m and "value" in m and "role" not in m for m in value)
    ):
        return from_sharegpt(value)
    return value


def from_sharegpt(messages: list[Row]) -> list[Row]:
    """``{"from": "human", "value": ...}`` → roles and contents."""
    return join_tool_calls([_from_sharegpt(message) for message in messages])


def _from_sharegpt(message: Row) -> Row:
    sender = message["from"]
    if sender not in _SHAREGPT_ROLES:
        raise DataError(f"a message is from {sender!r}; known are {', '.join(_SHAREGPT_ROLES)}")
    rest = {key: value for key, value in message.items() if key not in ("from", "value")}
    return {"role": _SHAREGPT_ROLES[sender], "content": message["value"], **rest}


def join_tool_calls(messages: list[Row]) -> list[Row]:
    """Messages of the role ``tool_call``, with the call as JSON text → ``tool_calls`` of the assistant's message.

    Calls in a row, and one that follows the assistant's words, are one message: that of one turn.
    """
    joined: list[Row] = []
    for message in messages:
        if message.get("role") == "tool_response":
            message = message | {"role": "tool"}
        if message.get("role") != "tool_call":
            joined.append(message)
            continue
        calls = _calls(message["content"])
        if joined and joined[-1].get("role") == "assistant":
            joined[-1] = joined[-1] | {"tool_calls": joined[-1].get("tool_calls", []) + calls}
        else:
            joined.append({"role": "assistant", "content": "", "tool_calls": calls})
    return joined


def _calls(content: Any) -> list[Row]:
    if isinstance(content, str):
        try:
            content = json.loads(content)
        except UNREADABLE as error:
            raise DataError(f"a tool call is {what_is_wrong(error)}") from error
    calls = content if isinstance(content, list) else [content]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise DataError('a tool call should be {"name": ..., "arguments": ...}')
    return [{"type": "function", "function": {**call, "arguments": call.get("arguments", {})}} for call in calls]


def as_tools(tools: Any) -> Any:
    """Tools, a list or its JSON text, each as ``{"type": "function", "function": ...}``; None for none."""
    if isinstance(tools, str):
        if not tools.strip():
            return None
        try:
            tools = json.loads(tools)
        except UNREADABLE as error:
            raise DataError(f"'tools' is {what_is_wrong(error)}") from error
    if not tools:
        return None
    if not is_message_list(tools):
        raise DataError(f"'tools' should be a list of objects, or one as JSON text, found {type_name(tools)}")
    bare = [isinstance(tool.get("name"), str) and "function" not in tool and "type" not in tool for tool in tools]
    return [
        {"type": "function", "function": tool} if is_bare else tool for tool, is_bare in zip(tools, bare, strict=True)
    ]


def without_tail(messages: list[Row]) -> tuple[list[Row], list[Row]]:
    """(what is asked, the answer): the answer is all that follows the last message of a user or a tool.

    Raises:
        DataError: there is no answer.
    """
    end = max((i + 1 for i, m in enumerate(messages) if m.get("role") not in ("assistant", "tool_call")), default=0)
    if end == len(messages):
        raise DataError("the messages do not end with an answer of the assistant")
    return messages[:end], messages[end:]


def shared_beginning(a: list[Row], b: list[Row]) -> int:
    """How many leading messages are equal, of which the last is not the last of either."""
    limit = min(len(a), len(b)) - 1
    return next((i for i in range(max(limit, 0)) if a[i] != b[i]), max(limit, 0))


def split_at_shared(a: list[Row], b: list[Row]) -> tuple[list[Row], list[Row], list[Row]]:
    """The shared beginning of two conversations, and what is left of each."""
    cut = shared_beginning(a, b)
    return a[:cut], a[cut:], b[cut:]
