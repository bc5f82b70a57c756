"""What messages say, and whether a rendered text says it.

A message says its content, its reasoning, and the names and arguments of its tool calls. All of it should stand in the
text, in the order of the messages. White space around it does not count, for templates strip, nor do compatibility
forms; that within a content is told apart (code depends on it);
JSON counts as equal however it is spaced, and so do arguments that a template writes name by name.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from fastdpo.data.mask import squeeze
from fastdpo.data.templates import REASONING, Messages

_END_OF_THOUGHT = "</think>"
_INSIDE_A_PART = re.compile(r"""['"]text['"]:\s*['"]$""")


class Fault(NamedTuple):
    """``what`` of message number ``message``: its ``content``, ``reasoning``, ``tool call``, or ``name`` is not there;
    ``text arguments`` and ``python`` are there in a form of which quotation marks and brackets would be learnt, and
    ``spacing`` is content that is there with other white space within it."""

    message: int
    what: str


class Comparison(NamedTuple):
    """What is wrong, and where each message's claims lie in the text (None where they are not found as written)."""

    faults: list[Fault]
    places: list[tuple[int, int] | None]


def compare(text: str, messages: Messages, start: int = 0) -> Comparison:
    """Look for what ``messages`` say, in order, from ``start`` on in ``text``."""
    found = _compare(text, messages, start, exact=True)
    if not found.faults:
        return found
    faults = _compare(squeeze(text[start:]), messages, 0, exact=False).faults
    spaced = [number for number, what in found.faults if what == "content" and Fault(number, what) not in faults]
    return Comparison([*faults, *(Fault(number, "spacing") for number in spaced)], found.places)


def _compare(text: str, messages: Messages, start: int, exact: bool) -> Comparison:
    faults: list[Fault] = []
    places: list[tuple[int, int] | None] = []
    for number, message in enumerate(messages):
        search = _Search(text, start, exact)
        _look_for(message, search)
        faults += [Fault(number, what) for what in search.missing]
        begin = search.begin
        places.append((begin, search.end) if begin is not None and not search.missing else None)
        start = start if begin is None else search.end
    return Comparison(faults, places)


class _Search:
    """Claims of one message, each looked for from where the message before it ends."""

    def __init__(self, text: str, start: int, exact: bool) -> None:
        self.text, self.start, self.exact = text, start, exact
        self.begin: int | None = None
        self.end = start
        self.missing: list[str] = []

    def find(self, *forms: str, before: int = -1) -> int:
        """Where the first of ``forms`` that is there begins; -1 if none is. An empty one is everywhere.

        Args:
            forms: what to look for.
            before: where it should end at the latest; -1 for anywhere.
        """
        for form in forms:
            form = form.strip() if self.exact else squeeze(form)
            position = self.text.find(form, self.start, None if before < 0 else before)
            if position >= 0:
                if form:
                    self.begin = position if self.begin is None else min(self.begin, position)
                    self.end = max(self.end, position + len(form))
                return position
        return -1

    def need(self, what: str, *forms: str, before: int = -1) -> int:
        position = self.find(*forms, before=before)
        if position < 0 and what not in self.missing:
            self.missing.append(what)
        return position


def _look_for(message: dict[str, Any], search: _Search) -> None:
    content = message.get("content")
    if isinstance(content, str):
        if content:
            _look_for_content(content, message["role"], search)
    elif content:
        for part in content:
            text = part if isinstance(part, str) else part.get("text", "")
            position = search.need("content", text)
            if position > 0 and _INSIDE_A_PART.search(search.text[max(0, position - 16) : position]):
                search.missing.append("python")
    refusal = message.get("refusal")
    if isinstance(refusal, str) and refusal:
        search.need("content", refusal)
    for field in REASONING:
        reasoning = message.get(field)
        if isinstance(reasoning, str) and reasoning:
            search.need("reasoning", reasoning)
    for call in calls_of(message):
        search.need("tool call", str(call.get("name", "")))
        _look_for_arguments(call.get("arguments"), search)
    name = message.get("name")
    if isinstance(name, str) and message["role"] in ("user", "assistant", "system"):
        search.need("name", name)


def _look_for_content(content: str, role: str, search: _Search) -> None:
    if search.find(content) >= 0:
        return
    if role == "assistant" and _END_OF_THOUGHT in content:
        # Templates take such an answer apart, and write the thought anew, or not at all.
        thought, _, answer = content.rpartition(_END_OF_THOUGHT)
        position = search.need("content", answer)
        # Before the answer, which may say what the thought says.
        search.need("reasoning", thought.rpartition("<think>")[2], before=position)
    else:
        escaped = (_json(content)[1:-1], json.dumps(content)[1:-1]) if role not in ("user", "assistant") else ()
        search.need("content", content, *escaped)


def calls_of(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The functions of a message's tool calls, each with ``name`` and ``arguments``."""
    calls = [call for call in message.get("tool_calls") or () if isinstance(call, dict)]
    found = [call["function"] if isinstance(call.get("function"), dict) else call for call in calls]
    old = message.get("function_call")
    return [*found, old] if isinstance(old, dict) else found


def _look_for_arguments(arguments: Any, search: _Search) -> None:
    if isinstance(arguments, str):
        if arguments.strip():
            _look_for_text_arguments(arguments, search)
    elif arguments:
        if repr(arguments) != _json(arguments) and search.find(repr(arguments)) >= 0:
            search.missing.append("python")
        elif search.find(_json(arguments), json.dumps(arguments), _compact(arguments)) < 0:
            _look_for_leaves(arguments, search)


def _look_for_text_arguments(arguments: str, search: _Search) -> None:
    position = search.find(arguments)
    if position < 0:
        escaped = search.find(_json(arguments)[1:-1], json.dumps(arguments)[1:-1]) >= 0
        search.missing.append("text arguments" if escaped else "tool call")
        return
    end = position + len(arguments.strip() if search.exact else squeeze(arguments))
    before, after = search.text[max(0, position - 1) : position], search.text[end : end + 1]
    if before == after and before in ('"', "'"):  # a string within what the call is written in
        search.missing.append("text arguments")


def _look_for_leaves(value: Any, search: _Search) -> None:
    """Names and values one by one, as templates write them that do not write JSON."""
    if isinstance(value, dict):
        for name, inner in value.items():
            search.need("tool call", name, _json(name)[1:-1])
            _look_for_leaves(inner, search)
    elif isinstance(value, list):
        if search.find(_json(value), json.dumps(value), _compact(value), repr(value)) < 0:
            for inner in value:
                _look_for_leaves(inner, search)
    elif isinstance(value, str):
        search.need("tool call", value, _json(value)[1:-1], json.dumps(value)[1:-1])
    else:
        search.need("tool call", json.dumps(value), str(value))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=False)
