"""What faults of a rendering, and errors of a template, come to in words of the row."""

from __future__ import annotations

import re
from typing import Any

from fastdpo.data.claims import Fault
from fastdpo.data.templates import Messages
from fastdpo.data.terms import first_line


def verdict(faults: list[Fault], messages: Messages, prompt: int) -> tuple[str, list[str]]:
    """(a reason to drop or "", reasons to doubt); the first ``prompt`` of the messages are the prompt's."""
    drop, found = "", []
    for number, what in faults:
        role = messages[number]["role"]
        if what == "python":
            found.append("written_as_python")
        elif what == "text arguments":
            found.append("arguments_as_text")
        elif what == "spacing":
            found.append(f"spacing_changed:{role}")
        elif number < prompt:
            # Templates leave out what was thought before earlier answers: so the models were trained.
            if what != "reasoning":
                found.append(f"prompt_left_out:{what} of {role}")
        elif role != "assistant":
            if what != "name":
                found.append(f"between_left_out:{what} of {role}")
        elif what == "reasoning":
            found.append("reasoning_left_out")
        elif what != "name":
            drop = "answer_left_out"
    return drop, found


def tools_left_out(tools: list[Any], text: str) -> list[str]:
    """A reason to doubt where a tool's name is not in the text of the prompt."""
    for tool in tools:
        inner = tool.get("function", tool) if isinstance(tool, dict) else {}
        name = inner.get("name") if isinstance(inner, dict) else None
        if isinstance(name, str) and name not in text:
            return [f"tools_left_out:{name}"]
    return []


def cause_of(error: Exception, messages: Messages) -> str:
    """A template's error in words of the row."""
    said = first_line(str(error) or repr(error))
    roles = ", ".join(str(message["role"]) for message in messages)
    if attribute := re.search(r"has no attribute '(\w+)'", said):
        name = attribute[1]
        without = [m["role"] for m in messages if name not in m and name in ("content", "role", "tool_calls")]
        who = f"a message of {without[0]}" if without else "a message or tool call"
        return f"it reads {name!r}, which {who} does not have ({said}; roles: {roles})"
    if "concatenate str" in said or "has no element" in said or "unsupported operand" in said:
        return f"it takes text where a message has a list, an object or nothing ({said}; roles: {roles})"
    return f"{said} (roles: {roles})"
