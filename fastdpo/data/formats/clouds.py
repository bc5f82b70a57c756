"""The preference formats of Gemini on Vertex and of Amazon Nova on Bedrock."""

from __future__ import annotations

import json
from typing import Any

from fastdpo.data.formats.base import Answers, Format, Row, Sample, number
from fastdpo.data.formats.messages import system_first
from fastdpo.data.formats.pairs import pair
from fastdpo.data.terms import DataError


def _detect_gemini(sample: Sample) -> bool:
    return sample.has("contents", "completions")


def _convert_gemini(row: Row) -> Answers:
    system = row.get("system_instruction") or row.get("systemInstruction")
    prompt = system_first(_text(system["parts"]) if system else None, _from_contents(row["contents"]))
    completions = row["completions"]
    answers = [_from_contents([item["completion"]]) for item in completions]
    return Answers(prompt, answers, [number(item, "score") for item in completions])


_GEMINI_ROLES = {"user": "user", "model": "assistant", "function": "tool", None: "user"}


def _from_contents(contents: list[Row]) -> list[Row]:
    messages: list[Row] = []
    for content in contents:
        role, parts = content.get("role"), content["parts"]
        if role not in _GEMINI_ROLES:
            raise DataError(f"a content has the role {role!r}; known are user, model and function")
        answers = [part[key] for part in parts for key in ("functionResponse", "function_response") if part.get(key)]
        if answers:
            if len(answers) < len(parts):
                raise DataError("a content has results of functions beside other parts; give each a content of its own")
            messages += [{"role": "tool", "name": a["name"], "content": _response(a["response"])} for a in answers]
            continue
        calls = [part[key] for part in parts for key in ("functionCall", "function_call") if part.get(key)]
        thoughts = [part for part in parts if part.get("thought")]
        said = [part for part in parts if not part.get("thought") and not _is_call(part)]
        message: Row = {"role": _GEMINI_ROLES[role], "content": _text(said)}
        if thoughts:
            message["reasoning_content"] = _text(thoughts)
        if calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call["name"], "arguments": call.get("args", {})}}
                for call in calls
            ]
        messages.append(message)
    return messages


def _response(value: Any) -> str:
    """What a function returned, an object, as models are given it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _is_call(part: Row) -> bool:
    return bool(part.get("functionCall") or part.get("function_call"))


def _text(parts: Any) -> str:
    """The text of parts of which each is a text."""
    for part in parts:
        if not isinstance(part.get("text"), str):
            found = ", ".join(key for key, value in part.items() if value is not None)
            raise DataError(f"a part is no text ({found}); only text can be trained on")
    return "".join(part["text"] for part in parts)


def _detect_nova(sample: Sample) -> bool:
    messages = sample["messages"]
    return isinstance(messages, list) and any(isinstance(m, dict) and "candidates" in m for m in messages)


def _convert_nova(row: Row) -> Row:
    *turns, last = row["messages"]
    prompt = [{"role": turn["role"], "content": _text(turn["content"])} for turn in turns]
    by_label: dict[str, list[str]] = {"preferred": [], "non-preferred": []}
    for candidate in last["candidates"]:
        label = candidate["preferenceLabel"]
        if label not in by_label:
            raise DataError(f"a candidate's preferenceLabel is {label!r}; it should be preferred or non-preferred")
        by_label[label].append(_text(candidate["content"]))
    if [len(texts) for texts in by_label.values()] != [1, 1]:
        raise DataError("the last message should have one candidate that is preferred and one that is not")
    system = _text(row["system"]) if row.get("system") else None
    return pair(prompt, by_label["preferred"][0], by_label["non-preferred"][0], system=system, chat=True)


FORMATS = (
    Format(
        name="gemini",
        title="Gemini preference format (Vertex)",
        source="https://cloud.google.com/vertex-ai/generative-ai/docs/models/gemini-preference-tuning-prepare",
        reads=("contents", "completions", "system_instruction", "systemInstruction"),
        detect=_detect_gemini,
        convert=_convert_gemini,
    ),
    Format(
        name="nova",
        title="Amazon Nova preference format (Bedrock)",
        source="https://docs.aws.amazon.com/nova/latest/userguide/nova-dpo.html",
        reads=("schemaVersion", "system", "messages"),
        detect=_detect_nova,
        convert=_convert_nova,
    ),
)
