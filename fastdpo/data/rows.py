"""Preference rows: what a row means, and where its prompt ends.

A row that cannot teach anything is dropped with a reason; one that is doubtful is kept with a reason; both are counted.
What no row of a set should have raises ``DataError``, with the row.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastdpo.data.chats import Chat
from fastdpo.data.image_parts import IMAGE_PART
from fastdpo.data.json_text import UNREADABLE, what_is_wrong
from fastdpo.data.mask import squeeze
from fastdpo.data.templates import REASONING, check_json
from fastdpo.data.terms import DataError, type_name

# What a message says beside its content; ids, names, weights and the like say nothing.
_SAYS_SOMETHING = (*REASONING, "refusal", "tool_calls", "function_call")
_TEXTS = ("text", "input_text", "output_text", None)  # types of parts that are text
_NO_TEXT = ("image", "image_url", "audio", "input_audio", "video", "file", "refusal", "thinking", "reasoning")


@dataclass
class Text:
    """A row of strings as it was read.

    Attributes:
        prompt, chosen, rejected: strings.
        implicit: whether the prompt is what the two others share.
    """

    prompt: str
    chosen: str
    rejected: str
    implicit: bool


@dataclass
class Row:
    """What was read, and why one should look at it."""

    pair: Text | Chat
    warn: list[str] = field(default_factory=list)


def common_prefix_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many leading elements two sequences share."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def read_row(row: dict[str, Any], implicit: bool, where: str, *, images: bool = False) -> Row | str:
    """A row as a pair, or the reason why it is dropped; with ``images``, these may stand in its prompt."""
    chosen, rejected = row["chosen"], row["rejected"]
    prompt: Any = None if implicit else row["prompt"]
    if any(value is None or value != value for value in (chosen, rejected, *(() if implicit else (prompt,)))):
        return "missing_value"  # null, or the NaN that some writers put for it
    chat = is_chat(chosen, f"{where}, chosen")
    if chat != is_chat(rejected, f"{where}, rejected"):
        raise DataError(f"{where}: one of chosen and rejected is a string, the other a message list; make them alike.")
    if chat:  # Arrow has every field in every message of a column, and templates are given none that is null
        chosen, rejected = _without_nulls(chosen), _without_nulls(rejected)
    if _is_empty(chosen) or _is_empty(rejected):
        return "empty_completion"
    warn: list[str] = []
    if implicit or (chat and isinstance(prompt, str)):
        # Some public sets repeat the question as a string beside whole conversations: the conversations are meant.
        question = prompt
        prompt, chosen, rejected = _split_prompt(chosen, rejected)
        if _is_empty(chosen) or _is_empty(rejected):
            return "empty_completion"
        if isinstance(question, str) and question.strip() and not _say(prompt, question):
            warn.append("prompt_left_out:column 'prompt'")
    else:
        if chat != is_chat(prompt, f"{where}, prompt"):
            raise DataError(f"{where}: the prompt is a message list but chosen and rejected are strings.")
        prompt = _without_nulls(prompt) if chat else prompt
        size = len(prompt)
        if _says_something(prompt) and chosen[:size] == prompt and rejected[:size] == prompt:
            warn.append("prompt_repeated")
    if not chat:
        if not prompt.strip():
            warn.append("empty_prompt")
        if any(text.lstrip().startswith("[{") and '"role"' in text for text in (chosen, rejected)):
            warn.append("messages_as_text")
        return Row(Text(prompt, chosen, rejected, implicit), warn)
    if not prompt:
        return "no_prompt"
    if not all(any(message["role"] == "assistant" for message in side) for side in (chosen, rejected)):
        return "no_answer"
    asked = _without_images(prompt) if images else prompt
    if not all(map(_is_text, (*asked, *chosen, *rejected))):
        return "not_text"
    sides = [_up_to_the_last_answer(side) for side in (chosen, rejected)]
    if sides != [chosen, rejected]:
        warn.append("unanswered_turn")
    first, second = chosen[0], rejected[0]
    if "assistant" not in (first["role"], second["role"]):
        if first != second:
            warn.append("questions_differ")
    elif prompt[-1]["role"] == "assistant" and not prompt[-1].get("tool_calls"):
        warn.append("prompt_answered")
    tools, kwargs = _tools(row, where), _template_kwargs(row, where)
    return Row(Chat(prompt, sides[0], sides[1], tools, kwargs, where), warn)


def _is_text(message: dict[str, Any]) -> bool:
    """Whether a message's content is a string, or parts that are text."""
    content = message.get("content")
    return not isinstance(content, list) or all(isinstance(part, str) or _is_text_part(part) for part in content)


def _without_images(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {**m, "content": [part for part in m["content"] if part != IMAGE_PART]}
        if isinstance(m.get("content"), list)
        else m
        for m in messages
    ]


def _is_text_part(part: Any) -> bool:
    """Whether a part is text and nothing else: some writers give every part an empty text beside its image."""
    if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.get("type", "text") not in _TEXTS:
        return False
    return not any(part.get(key) for key in _NO_TEXT)


def _say(messages: list[dict[str, Any]], text: str) -> bool:
    """Whether a text is what messages say, white space aside."""
    said = squeeze("".join(content for m in messages for content in _texts(m.get("content"))))
    return squeeze(text) in said


def _texts(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    return [text for part in content or () for text in (part.get("text") if isinstance(part, dict) else part,) if text]


def _up_to_the_last_answer(side: list[dict[str, Any]]) -> list[dict[str, Any]]:
    last = max(i for i, message in enumerate(side) if message["role"] == "assistant")
    return side[: last + 1]


def is_chat(value: Any, where: str) -> bool:
    """True for a message list, False for a string, DataError for anything else."""
    if isinstance(value, str):
        return False
    if not isinstance(value, list):
        raise DataError(f"{where}: needed a string or a list of messages, found {type_name(value)}.")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            found = f"one with the keys {', '.join(message)}" if isinstance(message, dict) else type_name(message)
            raise DataError(f'{where}: each message must be {{"role": ..., "content": ...}}, found {found}.')
        if not isinstance(message.get("content"), (str, list, type(None))):
            raise DataError(f"{where}: a message's content must be a string, found {type_name(message['content'])}.")
    return True


def _without_nulls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in message.items() if value is not None} if None in message.values() else message
        for message in messages
    ]


def _says_something(prompt: str | list[dict[str, Any]]) -> bool:
    """Long enough that a completion does not begin with it by chance."""
    return len(prompt.strip()) > 3 if isinstance(prompt, str) else bool(prompt)


def _is_empty(completion: str | list[dict[str, Any]]) -> bool:
    """No text, and nothing that stands for text (a tool call)."""
    if isinstance(completion, str):
        return not completion.strip()
    return not any(_has_substance(message) for message in completion)


def _has_substance(message: dict[str, Any]) -> bool:
    content = message.get("content")
    said = bool(content.strip()) if isinstance(content, str) else bool(content)
    return said or any(message.get(key) for key in _SAYS_SOMETHING)


def _split_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """The shared beginning of two texts or conversations, and what is left of each.

    The same cut as TRL's: one element is always left to each, and a space before the point where two texts part goes
    to the completions.
    """
    cut = min(common_prefix_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    parts = chosen[cut] != rejected[cut]
    if parts and cut > 0 and chosen[cut - 1] == " ":
        cut -= 1
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _without_blank(value: Any) -> Any:
    """A table of text has an empty cell where a row has nothing."""
    return None if isinstance(value, str) and not value.strip() else value


def _tools(row: dict[str, Any], where: str) -> list[dict[str, Any]] | None:
    tools = _without_blank(row.get("tools"))
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except UNREADABLE as error:
            raise DataError(f"{where}, tools: {what_is_wrong(error)}.") from error
    if not isinstance(tools, (list, type(None))):
        raise DataError(f"{where}, tools: needed a list of tools, or one as JSON text, found {type_name(tools)}.")
    for tool in tools or ():
        if not isinstance(tool, dict):
            raise DataError(f"{where}, tools: each must be an object, found {type_name(tool)}.")
        check_json(tool, f"{where}, tools")
    return tools


def _template_kwargs(row: dict[str, Any], where: str) -> dict[str, Any]:
    more = _without_blank(row.get("chat_template_kwargs"))
    if isinstance(more, str):
        try:
            more = json.loads(more)
        except UNREADABLE as error:
            raise DataError(f"{where}, chat_template_kwargs: needed an object, found a string.") from error
    if not isinstance(more or {}, dict):
        raise DataError(f"{where}, chat_template_kwargs: needed an object, found {type_name(more)}.")
    return more or {}
