"""ms-swift's preference formats."""

from __future__ import annotations

from typing import Any

from fastdpo.data.formats.base import Format, Row, Sample, text
from fastdpo.data.formats.messages import as_messages, join_tool_calls, split_at_shared, system_first, user
from fastdpo.data.formats.pairs import from_turns, pair
from fastdpo.data.terms import DataError, type_name


def _detect(sample: Sample) -> bool:
    return sample.has("messages") and (sample.has("rejected_response") or sample.has("rejected_messages"))


def _convert(row: Row) -> Row:
    messages, other = _clean(row["messages"]), row.get("rejected_messages")
    system = row.get("system")
    if other is not None:
        if row.get("rejected_response") is not None:
            raise DataError("'rejected_response' and 'rejected_messages' are both given; remove one")
        if row.get("rejected_tools") not in (None, row.get("tools")):
            raise DataError("'rejected_tools' are not 'tools', but both answers have one prompt")
        sides = [join_tool_calls(system_first(system, side)) for side in (messages, _clean(other))]
        prompt, chosen, rejected = split_at_shared(*sides)
    else:
        cut, rejected = _rejected(row["rejected_response"], messages)
        prompt, chosen = join_tool_calls(system_first(system, messages[:cut])), join_tool_calls(messages[cut:])
        rejected = join_tool_calls(rejected)
    return pair(prompt, chosen, rejected, tools=row.get("tools"), chat=True)


def _clean(messages: Any) -> list[Row]:
    """Without ms-swift's own switch of what is learnt, which is no part of what is said."""
    return [{key: value for key, value in m.items() if key != "loss"} for m in as_messages(messages)]


def _rejected(response: Any, messages: list[Row]) -> tuple[int, list[Row]]:
    """(where the answer begins, the other answer): text is for the last message, messages for all since the user's."""
    if isinstance(response, list) and len(response) == 1 and isinstance(response[0], str):
        response = response[0]
    if isinstance(response, str):
        if messages[-1]["role"] != "assistant":
            raise DataError("'messages' should end with the preferred answer, a message of the assistant")
        return len(messages) - 1, [{"role": "assistant", "content": response}]
    if isinstance(response, list) and all(isinstance(message, dict) for message in response):
        return max(i + 1 for i, message in enumerate(messages) if message["role"] == "user"), _clean(response)
    raise DataError(
        f"'rejected_response' should be a string or a list of messages, found {type_name(response)}; write a row for "
        "each of several answers"
    )


def _detect_query(sample: Sample) -> bool:
    return sample.has("query", "response", "rejected_response")


def _convert_query(row: Row) -> Row:
    prompt = [*from_turns(row.get("history") or []), user(text(row, "query"))]
    return pair(
        prompt, row["response"], row["rejected_response"], system=row.get("system"), tools=row.get("tools"), chat=True
    )


_SOURCE = "https://swift.readthedocs.io/en/latest/Customization/Custom-dataset.html"
FORMATS = (
    Format(
        name="ms_swift",
        title="ms-swift's messages with a rejected answer",
        source=_SOURCE,
        reads=("messages", "system", "tools", "rejected_response", "rejected_messages", "rejected_tools"),
        detect=_detect,
        convert=_convert,
    ),
    Format(
        name="ms_swift_query",
        title="ms-swift's query and responses",
        source=_SOURCE,
        reads=("query", "response", "rejected_response", "system", "history", "tools"),
        detect=_detect_query,
        convert=_convert_query,
    ),
)
