"""Random rows of message lists: roles, tools, calls, reasoning, parts, dates, nulls, quotes, texts that look like JSON.

Each text begins with a tag of its own (``Ua1z``), so that a test can tell which of them came through.
"""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

NASTY = [
    "plain words",
    '"To be, or not to be."',
    '{"a": [1, 2.50, null]}',
    '["a", "b"]',
    "null",
    "42",
    "2024-05-01",
    "2024-05-01T10:00:00Z",
    'it\'s "so" \\ and so',
    "two\nlines\tand a tab",
    "Ünïcode, 漢字 and 🙂",
    "ends in a colon:",
    "[{'type': 'text', 'text': 'x'}]",
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
_VALUES = st.one_of(st.sampled_from(NASTY), st.integers(-5, 10**12), st.booleans(), st.none(), st.floats(-9, 9))


class _Row:
    """Draws the messages of a row, and numbers their texts."""

    def __init__(self, draw: Any) -> None:
        self.draw, self.count = draw, 0

    def text(self, kind: str) -> str:
        self.count += 1
        return f"{kind}a{self.count}z {self.draw(st.sampled_from(NASTY))}"

    def content(self, kind: str, parts: bool) -> Any:
        return [{"type": "text", "text": self.text(kind)}] if parts else self.text(kind)

    def call(self, as_text: bool) -> dict[str, Any]:
        arguments = {f"K{self.count}z": self.text("A")}
        arguments |= self.draw(st.dictionaries(st.sampled_from(["city", "when", "n"]), _VALUES, max_size=2))
        given = json.dumps(arguments, ensure_ascii=self.draw(st.booleans())) if as_text else arguments
        return {"id": "call00001", "type": "function", "function": {"name": "get_weather", "arguments": given}}


KINDS = ("answer", "answer", "call", "reasoned", "thought", "agent", "turns")


@st.composite
def chat_rows(draw: Any, parts: bool | None = None, as_text: bool | None = None, kinds: Any = KINDS) -> dict[str, Any]:
    """Rows of message lists.

    Args:
        parts: whether contents are parts; None for either.
        as_text: whether arguments of calls are JSON text; None for either.
        kinds: of answers, of ``KINDS``.
    """
    row = _Row(draw)
    parts = draw(st.booleans()) if parts is None else parts
    as_text = draw(st.booleans()) if as_text is None else as_text
    kinds = st.sampled_from(kinds)

    def answer(**more: Any) -> dict[str, Any]:
        return {"role": "assistant", "content": row.content("A", parts), **more}

    def call() -> dict[str, Any]:
        content = draw(st.sampled_from([{"content": ""}, {"content": None}, {}]))
        return {"role": "assistant", **content, "tool_calls": [row.call(as_text)]}

    def side(kind: str) -> list[dict[str, Any]]:
        if kind == "call":
            return [call()]
        if kind == "reasoned":
            return [answer(**{draw(st.sampled_from(["reasoning_content", "thinking"])): row.text("R")})]
        if kind == "thought":
            return [{"role": "assistant", "content": f"<think>\n{row.text('R')}\n</think>\n\n{row.text('A')}"}]
        if kind == "agent":
            return [call(), {"role": "tool", "tool_call_id": "call00001", "content": row.text("T")}, answer()]
        if kind == "turns":
            return [answer(), {"role": "user", "content": row.content("U", parts)}, answer()]
        return [answer(**draw(st.sampled_from([{}, {"tool_calls": None}, {"reasoning_content": None}])))]

    prompt = [{"role": "user", "content": row.content("U", parts)}]
    if draw(st.booleans()):
        prompt = [prompt[0], answer(), {"role": "user", "content": row.content("U", parts)}]
    if draw(st.booleans()):
        prompt = [{"role": "system", "content": row.content("S", parts)}, *prompt]
    found = {"prompt": prompt, "chosen": side(draw(kinds)), "rejected": side(draw(kinds))}
    return found | ({"tools": TOOLS} if draw(st.booleans()) else {})


@st.composite
def text_rows(draw: Any) -> dict[str, Any]:
    """Rows of strings, which may begin with spaces and end in anything."""
    row = _Row(draw)
    prompt = row.text("U") + draw(st.sampled_from(["", "\n", ": "]))
    spaces = st.sampled_from(["", " ", "\n\n"])
    return {"prompt": prompt, **{side: draw(spaces) + row.text("A") for side in ("chosen", "rejected")}}


def in_answers(row: dict[str, Any]) -> dict[str, Any]:
    """The same row with the prompt at the beginning of both answers, and in no column of its own."""
    rest = {name: value for name, value in row.items() if name != "prompt"}
    return rest | {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}
