"""LLaMA-Factory's preference formats: alpaca, ShareGPT, and the messages of its version 1."""

from __future__ import annotations

import json
from typing import Any

from fastdpo.data.formats.base import Format, Row, Sample, text
from fastdpo.data.formats.messages import as_messages, as_tools, split_at_shared, system_first, user
from fastdpo.data.formats.pairs import from_turns, pair
from fastdpo.data.terms import DataError


def _detect_alpaca(sample: Sample) -> bool:
    return sample.has("chosen", "rejected") and sample.texts("instruction") and not sample.has("prompt")


def _convert_alpaca(row: Row) -> Row:
    # The input belongs to the instruction, on a line of its own, as LLaMA-Factory joins them.
    question = "\n".join(part for part in (text(row, "instruction"), row.get("input")) if part)
    history = from_turns(row.get("history") or [])
    return pair([*history, user(question)], row["chosen"], row["rejected"], system=row.get("system"), chat=True)


def _detect_sharegpt(sample: Sample) -> bool:
    if not sample.has("chosen", "rejected"):
        return False
    columns = ("conversations", "prompt", "chosen")
    return any(sample.messages(c) and "from" in _first(sample[c]) for c in columns)


def _first(value: Any) -> Row:
    return value if isinstance(value, dict) else value[0]


def _convert_sharegpt(row: Row) -> Row:
    prompt = row.get("conversations") or row.get("prompt")
    chosen, rejected = (as_messages(row[side]) for side in ("chosen", "rejected"))
    if prompt is None:
        prompt, chosen, rejected = split_at_shared(chosen, rejected)
    return pair(prompt, chosen, rejected, system=row.get("system"), tools=row.get("tools"), chat=True)


def _detect_v1(sample: Sample) -> bool:
    return sample.has("chosen_messages", "rejected_messages")


def _convert_v1(row: Row) -> Row:
    sides = [[_message(message) for message in row[f"{side}_messages"]] for side in ("chosen", "rejected")]
    prompt, chosen, rejected = split_at_shared(*sides)
    tools = as_tools(row.get("tools"))
    new = {"prompt": system_first(row.get("system"), prompt), "chosen": chosen, "rejected": rejected}
    return new if tools is None else new | {"tools": tools}


def _message(message: Row) -> Row:
    """``{"type": "text", "value": ...}`` and the like → what chat templates read."""
    content = message["content"]
    new = {key: value for key, value in message.items() if key not in ("content", "loss_weight")}
    if not isinstance(content, list):
        return new | {"content": content}
    texts, reasoning, calls = [], [], []
    for part in content:
        if part["type"] == "text":
            texts.append(part.get("value", part.get("text")))
        elif part["type"] == "reasoning":
            reasoning.append(part["value"])
        elif part["type"] == "tool_call":
            call = part["value"]
            calls.append({"type": "function", "function": json.loads(call) if isinstance(call, str) else call})
        else:
            raise DataError(f"a message has a part of the type {part['type']!r}; only text can be trained on")
    new["content"] = "".join(texts)
    if reasoning:
        new["reasoning_content"] = "".join(reasoning)
    return new | {"tool_calls": calls} if calls else new


_SOURCE = "https://llamafactory.readthedocs.io/en/latest/getting_started/data_preparation.html"
FORMATS = (
    Format(
        name="llamafactory_alpaca",
        title="LLaMA-Factory's alpaca preference format",
        source=_SOURCE,
        reads=("instruction", "input", "system", "history", "chosen", "rejected"),
        detect=_detect_alpaca,
        convert=_convert_alpaca,
    ),
    Format(
        name="llamafactory_sharegpt",
        title="ShareGPT preference format, as LLaMA-Factory has it",
        source=_SOURCE,
        reads=("conversations", "prompt", "system", "tools", "chosen", "rejected"),
        detect=_detect_sharegpt,
        convert=_convert_sharegpt,
    ),
    Format(
        name="llamafactory_v1",
        title="LLaMA-Factory's version 1 messages",
        source="https://github.com/hiyouga/LLaMA-Factory/tree/main/src/llamafactory/v1",
        reads=("chosen_messages", "rejected_messages", "tools", "system"),
        detect=_detect_v1,
        convert=_convert_v1,
    ),
)
