"""Pairs in columns of their own: TRL's format, and what people write that means the same."""

from __future__ import annotations

from typing import Any

from fastdpo.data.formats.base import Answers, Format, Row, Sample, is_message_list
from fastdpo.data.formats.messages import as_messages, as_tools, assistant, system_first, user
from fastdpo.data.terms import DataError, type_name

HISTORY = ("messages", "conversations", "history")  # columns in which a conversation before the answers may be


def pair(prompt: Any, chosen: Any, rejected: Any, *, system: Any = None, tools: Any = None, chat: bool = False) -> Row:
    """A pair, with message lists throughout if any part of it is one, or ``chat`` says so.

    Args:
        prompt: text, messages, or None where chosen and rejected begin with it.
        chosen, rejected: texts, messages, or one message.
        system: a system message's text.
        tools: the tools, or their JSON text.
        chat: whether texts are what a user and an assistant say, rather than text that goes on.
    """
    prompt, chosen, rejected = (as_messages(value) for value in (prompt, chosen, rejected))
    row: Row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if isinstance(prompt, str) and all(_is_answer(side) for side in (chosen, rejected)):
        prompt = [user(prompt)]
    chat = chat or bool(system) or isinstance(prompt, list)
    if chat and prompt is not None:
        conversations = isinstance(prompt, str) and isinstance(chosen, list) and isinstance(rejected, list)
        if conversations:  # these begin with the prompt, which says it once more
            row |= {"chosen": system_first(system, chosen), "rejected": system_first(system, rejected)}
        else:
            prompt = [user(prompt)] if isinstance(prompt, str) else prompt
            row["prompt"] = system_first(system, prompt)
            row |= {side: [assistant(row[side])] for side in ("chosen", "rejected") if isinstance(row[side], str)}
    elif isinstance(chosen, list) and isinstance(rejected, list):
        row |= {"chosen": system_first(system, chosen), "rejected": system_first(system, rejected)}
    elif system and prompt is None:
        raise DataError("there is a system message beside texts that have no prompt of their own; give it as 'prompt'")
    tools = as_tools(tools) if tools is not None and chat else tools
    return row if tools is None else row | {"tools": tools}


def _is_answer(value: Any) -> bool:
    """Whether these are messages of the assistant's turn alone, and not a conversation from its beginning."""
    return is_message_list(value) and value[0].get("role") == "assistant"


def _convert(row: Row) -> Row:
    prompt, chosen, rejected = (as_messages(row.get(name)) for name in ("prompt", "chosen", "rejected"))
    if row.get("system") and isinstance(chosen, str) and isinstance(prompt, str):
        raise DataError(
            "a text for the system, which the first rows have none of; name the format: --format axolotl_prompt_pairs"
        )
    histories = [name for name in HISTORY if name in row]
    # Beside conversations, which say all, such a column says something again, and is left.
    if histories and isinstance(prompt, (str, type(None))) and (isinstance(chosen, str) or _is_answer(chosen)):
        given = [name for name in histories if row[name]]
        if len(given) > 1:
            raise DataError(f"the columns {' and '.join(map(repr, given))} are both conversations; remove one")
        prompt = _history(row[given[0]], given[0], prompt, chosen) if given else [user(prompt)]
        histories = []
    new = pair(prompt, chosen, rejected, system=row.get("system"))
    if "prompt" not in row and prompt is None:
        del new["prompt"]
    return new | {name: row[name] for name in histories}


def _history(value: Any, name: str, prompt: str | None, chosen: Any) -> list[Row]:
    """What comes before the answers, of a column that holds the conversation so far."""
    messages = from_turns(value)
    if not isinstance(messages, list) or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise DataError(f"{name!r} should be a list of messages, found {type_name(value)}")
    if messages[-1:] == as_messages(chosen) or messages[-1] == assistant(chosen):
        messages = messages[:-1]  # it goes on to the answer
    last = messages[-1] if messages else {"role": "assistant"}
    if prompt is None:
        if last["role"] == "assistant":
            raise DataError(f"{name!r} ends with an answer that is not 'chosen'; it should end with the question")
        return messages
    if last == user(prompt):
        return messages
    if last["role"] != "assistant":
        raise DataError(f"'prompt' and the last message of {name!r} ask different things; which is the question?")
    return [*messages, user(prompt)]


def from_turns(value: Any) -> list[Row]:
    """``[[question, answer], ...]``, or messages."""
    if isinstance(value, list) and value and all(isinstance(turn, (list, tuple)) and len(turn) == 2 for turn in value):
        return [message for question, answer in value for message in (user(question), assistant(answer))]
    messages: list[Row] = as_messages(value)
    return messages


def pairs_of(answers: Answers) -> tuple[list[Row], int]:
    """Pairs of neighbours in the order of the scores, and how many neighbours there are that score alike.

    K answers make K - 1 pairs, and no answer is in more than two of them.
    """
    order = sorted(range(len(answers.answers)), key=lambda i: -answers.scores[i])
    rows, ties = [], 0
    for better, worse in zip(order, order[1:], strict=False):
        if answers.scores[better] > answers.scores[worse]:
            new = pair(answers.prompt, answers.answers[better], answers.answers[worse], tools=answers.more.get("tools"))
            rows.append(answers.more | new)
        else:
            ties += 1
    return rows, ties


def _detect(sample: Sample) -> bool:
    return sample.has("chosen", "rejected")


FORMATS = (
    Format(
        name="trl",
        title="pairs in TRL's columns",
        source="https://huggingface.co/docs/trl/dataset_formats#preference",
        reads=("prompt", "chosen", "rejected", "system", *HISTORY),
        detect=_detect,
        convert=_convert,
        general=True,
    ),
)
