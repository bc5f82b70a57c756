"""What a chat template makes of conversations of one shape, found out once by rendering one that holds marks alone.

Each thing that a message may say is replaced by a mark that no template writes of its own accord. What is left out,
what stands around an answer, and which form of the messages the template takes then show without doubt, where a short
answer ("a") could be found by chance. What depends on the text itself is looked at row by row, in
:mod:`fastdpo.data.chats`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import count
from os.path import commonprefix
from typing import Any

from fastdpo.data.claims import Fault, compare
from fastdpo.data.forms import forms_for, in_form
from fastdpo.data.templates import REASONING, BoundTemplate, Messages


@dataclass(frozen=True)
class SideFacts:
    """Of chosen or rejected.

    Attributes:
        faults: what is not rendered, with the numbers of messages in prompt + completion.
        tail: what it writes after that; None where it cannot be told.
        end_token: the first special token of that; None if there is none.
        header: what it writes after that and what begins another turn.
        prompt_scored: whether prompt and completion part before the prompt has been said.
    """

    faults: tuple[Fault, ...]
    tail: str | None
    end_token: str | None
    header: str
    prompt_scored: bool


@dataclass(frozen=True)
class Facts:
    """Of a shape.

    Attributes:
        forms: which forms of the messages the template takes best.
        opening: what ``add_generation_prompt`` adds.
        sides: of chosen and rejected.
    """

    forms: tuple[str, ...]
    opening: str
    sides: tuple[SideFacts, SideFacts]


def shape_of(messages: Messages) -> tuple[Any, ...]:
    """What of messages decides how they are rendered, beside their words."""
    return tuple(map(_shape, messages))


def _shape(message: dict[str, Any]) -> Any:
    content = message.get("content")
    if len(message) == 2 and isinstance(content, str) and content:
        return message["role"]
    kind = tuple(map(_part_kind, content)) if isinstance(content, list) else (type(content), bool(content))
    calls = message.get("tool_calls") or ()
    kinds = tuple(type(call.get("function", call).get("arguments")) for call in calls if isinstance(call, dict))
    return (message["role"], kind, kinds, tuple((name, bool(value)) for name, value in message.items()))


def _part_kind(part: Any) -> Any:
    return part.get("type") if isinstance(part, dict) else type(part)


def find_facts(
    template: BoundTemplate,
    prompt: Messages,
    sides: tuple[Messages, Messages],
    special_tokens: Collection[str],
) -> Facts | None:
    """The facts of the shape of these messages; None where the template refuses every form of the marked ones."""
    numbers = count()
    marked = _marked(prompt, numbers)
    marked_sides = [_marked(side, numbers) for side in sides]
    best: Facts | None = None
    for forms in forms_for(prompt + sides[0] + sides[1]):
        try:
            facts = _in_forms(template, forms, marked, marked_sides, special_tokens)
        except Exception:  # templates raise whatever their authors chose
            continue
        if best is None or _weight(facts) < _weight(best):
            best = facts
        if not _weight(best):
            break
    return best


def _weight(facts: Facts) -> int:
    return sum(len(side.faults) for side in facts.sides)


def _in_forms(
    template: BoundTemplate,
    forms: tuple[str, ...],
    prompt: Messages,
    sides: list[Messages],
    special_tokens: Collection[str],
) -> Facts:
    prompt = in_form(prompt, forms)
    with_opening = template.render(prompt, answer=True)
    without = template.render(prompt)
    opening = with_opening[len(without) :] if with_opening.startswith(without) else ""
    found = []
    for side in sides:
        side = in_form(side, forms)
        before = with_opening if side[0]["role"] == "assistant" else without
        whole = template.render(prompt + side)
        found.append(_side_facts(whole, before, opening, prompt, side, special_tokens))
    return Facts(forms, opening, (found[0], found[1]))


def _side_facts(
    whole: str, before: str, opening: str, prompt: Messages, side: Messages, special_tokens: Collection[str]
) -> SideFacts:
    faults, places = compare(whole, prompt + side)
    shared = len(commonprefix((before, whole)))
    last_word, last_answer = places[len(prompt) - 1], places[-1]
    tail, header = None, ""
    if last_answer:
        tail, header = _without_header(whole[last_answer[1] :], whole[: last_answer[0]], opening, special_tokens)
    return SideFacts(
        faults=tuple(faults),
        tail=tail,
        end_token=first_of(special_tokens, tail or ""),
        header=header,
        prompt_scored=last_word is not None and last_word[1] > shared,
    )


def _without_header(tail: str, before_answer: str, opening: str, special_tokens: Collection[str]) -> tuple[str, str]:
    """What follows an answer, parted where another turn begins: with what stands before every answer."""
    if opening.strip() and tail.endswith(opening):
        return tail.removesuffix(opening), opening
    end_token = first_of(special_tokens, tail)
    rest = tail.partition(end_token)[2] if end_token else ""
    if rest.strip() and before_answer.endswith(rest):
        return tail.removesuffix(rest), rest
    return tail, ""


def first_of(tokens: Collection[str], text: str) -> str | None:
    """The token that stands first in a text; None if there is none."""
    return min((token for token in tokens if token in text), key=lambda t: (text.find(t), -len(t)), default=None)


def _marked(messages: Messages, numbers: Iterator[int]) -> Messages:
    return [_mark(message, numbers) for message in messages]


def _mark(message: dict[str, Any], numbers: Iterator[int]) -> dict[str, Any]:
    def mark(value: Any) -> Any:
        return f"Zq{next(numbers):03d}vX" if isinstance(value, str) and value else value

    def mark_part(part: Any) -> Any:
        if isinstance(part, dict):
            return {**part, "text": mark(part["text"])} if "text" in part else part  # an image has none
        return mark(part)

    def mark_call(call: Any) -> Any:
        if not isinstance(call, dict):
            return call
        if isinstance(call.get("function"), dict):
            return {**call, "function": mark_call(call["function"])}
        arguments = {mark("name"): mark("value")} if call.get("arguments") not in (None, {}, "", "{}") else {}
        text = isinstance(call.get("arguments"), str)
        return {**call, "name": mark(call.get("name")), "arguments": json.dumps(arguments) if text else arguments}

    found = dict(message)
    content = message.get("content")
    if isinstance(content, str):
        found["content"] = mark(content)
    elif isinstance(content, list):
        found["content"] = [mark_part(part) for part in content]
    if "refusal" in message:
        found["refusal"] = mark(message["refusal"])
    thought = next((message[name] for name in REASONING if message.get(name)), None)
    if isinstance(thought, str):
        found.update(dict.fromkeys([name for name in REASONING if name in message], mark(thought)))
    if message.get("tool_calls"):
        found["tool_calls"] = [mark_call(call) for call in message["tool_calls"]]
    return found
