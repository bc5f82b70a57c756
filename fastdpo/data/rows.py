"""Preference rows → token ids: what a row means, where its prompt ends, and whether the mask is right.

A row that cannot teach anything, or whose mask would be wrong, is dropped with a reason; one that is doubtful is kept
with a reason; both are counted. What no row of a set should have raises ``DataError``, with the row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastdpo.data.files import TOKEN_COLUMNS, DataError, first_line, type_name
from fastdpo.data.mask import decode, judge_chat, judge_text, without_leading
from fastdpo.data.summary import DROP_REASONS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Pair:
    """One row in the form that is tokenised: either three strings or three message lists."""

    prompt: Any
    chosen: Any
    rejected: Any
    template_kwargs: dict[str, Any]
    warn: list[str]
    has_generation_prompt: bool = True


def tokenize_batch(
    batch: dict[str, list[Any]], indices: list[int], tokenizer: PreTrainedTokenizerBase, implicit: bool
) -> dict[str, list[Any]]:
    """The function that ``prepare`` maps: columns of rows → columns of ids, with the fate of each row."""
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    out: dict[str, list[Any]] = {name: [[] for _ in rows] for name in TOKEN_COLUMNS}
    out["drop"], out["warn"] = [""] * len(rows), [[] for _ in rows]
    pairs: dict[int, Pair] = {}
    special = set(tokenizer.all_special_ids)
    for i, row in enumerate(rows):
        pair = _read_row(row, implicit, f"row {indices[i]}")
        if isinstance(pair, str):
            out["drop"][i] = pair
        else:
            pairs[i] = pair
    for i, (prompt, whole_chosen, whole_rejected) in _tokenize_pairs(pairs, indices, tokenizer):
        boundary = min(common_prefix_length(prompt, whole_chosen), common_prefix_length(prompt, whole_rejected))
        chosen, rejected = whole_chosen[boundary:], whole_rejected[boundary:]
        # With no prompt the first token has no predecessor, so it is not predicted either.
        if min(len(chosen), len(rejected)) <= (boundary == 0):
            out["drop"][i] = "empty_completion"
            continue
        wrong = _judge(pairs[i], prompt[:boundary], (chosen, rejected), tokenizer, special)
        out["prompt_ids"][i], out["chosen_ids"][i], out["rejected_ids"][i] = prompt[:boundary], chosen, rejected
        if wrong in DROP_REASONS:
            out["drop"][i] = wrong
            continue
        found = [wrong] if wrong else []
        shortened = ["prompt_shortened"] if boundary < len(prompt) else []
        identical = ["identical"] if chosen == rejected else []
        out["warn"][i] = pairs[i].warn + found + shortened + identical
    return out


def _judge(
    pair: Pair,
    prompt: list[int],
    completions: tuple[list[int], list[int]],
    tokenizer: PreTrainedTokenizerBase,
    special: set[int],
) -> str | None:
    """What decoding says about the mask: a reason, or None."""
    decoded = [decode(tokenizer, ids) for ids in completions]
    if isinstance(pair.prompt, str):
        texts = [with_eos(text, tokenizer.eos_token) for text in (pair.chosen, pair.rejected)]
        return judge_text(pair.prompt, texts, decode(tokenizer, without_leading(prompt, special)), decoded)
    messages = (pair.chosen, pair.rejected)
    return judge_chat(pair.prompt, messages, decode(tokenizer, prompt), decoded, pair.has_generation_prompt)


def with_eos(text: str, eos: str) -> str:
    return text if text.endswith(eos) else text + eos


def common_prefix_length(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many leading elements two sequences share."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _read_row(row: dict[str, Any], implicit: bool, where: str) -> Pair | str:
    """A row as a pair, or the reason why it is dropped."""
    prompt, chosen, rejected = (None if implicit else row["prompt"]), row["chosen"], row["rejected"]
    if any(value is None or value != value for value in (chosen, rejected, *(() if implicit else (prompt,)))):
        return "missing_value"  # null, or the NaN that some writers put for it
    chat = _is_chat(chosen, f"{where}, chosen")
    if chat != _is_chat(rejected, f"{where}, rejected"):
        raise DataError(f"{where}: one of chosen and rejected is a string, the other a message list; make them alike.")
    if _is_empty(chosen) or _is_empty(rejected):
        return "empty_completion"
    warn: list[str] = []
    if implicit or (chat and isinstance(prompt, str)):
        # Some public sets repeat the question as a string beside whole conversations: the conversations are meant.
        prompt, chosen, rejected = _split_prompt(chosen, rejected)
        if _is_empty(chosen) or _is_empty(rejected):
            return "empty_completion"
    else:
        if chat != _is_chat(prompt, f"{where}, prompt"):
            raise DataError(f"{where}: the prompt is a message list but chosen and rejected are strings.")
        size = len(prompt)
        if _says_something(prompt) and chosen[:size] == prompt and rejected[:size] == prompt:
            warn.append("prompt_repeated")
    if not chat:
        if not prompt.strip():
            warn.append("empty_prompt")
        if any(text.lstrip().startswith("[{") and '"role"' in text for text in (chosen, rejected)):
            warn.append("messages_as_text")
        return Pair(prompt, chosen, rejected, {}, warn)
    if not prompt:
        return "no_prompt"
    if not all(any(message["role"] == "assistant" for message in side) for side in (chosen, rejected)):
        return "no_answer"
    if any(message["role"] == "user" for message in chosen + rejected):
        warn.append("user_in_completion")
    return Pair(prompt, chosen, rejected, _template_kwargs(row, where), warn)


def _is_chat(value: Any, where: str) -> bool:
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
    return said or any(value for key, value in message.items() if key not in ("role", "content", "name"))


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


def _template_kwargs(row: dict[str, Any], where: str) -> dict[str, Any]:
    tools, more = row.get("tools"), row.get("chat_template_kwargs") or {}
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}, tools: not valid JSON: {error.msg} at column {error.colno}.") from error
    if not isinstance(tools, (list, type(None))):
        raise DataError(f"{where}, tools: needed a list of tools, or one as JSON text, found {type_name(tools)}.")
    if not isinstance(more, dict):
        raise DataError(f"{where}, chat_template_kwargs: needed an object, found {type_name(more)}.")
    return {"tools": tools} | more


def _tokenize_pairs(
    pairs: dict[int, Pair], indices: list[int], tokenizer: PreTrainedTokenizerBase
) -> Iterable[tuple[int, tuple[list[int], list[int], list[int]]]]:
    """(prompt, prompt + chosen, prompt + rejected) as ids, for each pair."""
    texts = [i for i, pair in pairs.items() if isinstance(pair.prompt, str)]
    yield from _tokenize_texts(texts, pairs, tokenizer)
    # One call of the template per set of arguments: nearly always one for the whole batch.
    groups: dict[str, list[int]] = {}
    for i in pairs.keys() - set(texts):
        groups.setdefault(repr(pairs[i].template_kwargs), []).append(i)
    for rows in groups.values():
        yield from _tokenize_chats(rows, pairs, indices, tokenizer)


def _tokenize_texts(rows: list[int], pairs: dict[int, Pair], tokenizer: PreTrainedTokenizerBase) -> Iterable[Any]:
    if not rows:
        return
    eos = tokenizer.eos_token
    if eos is None:
        raise DataError("The tokenizer has no EOS token to end a completion with; set tokenizer.eos_token.")
    texts = []
    for i in rows:
        pair = pairs[i]
        chosen, rejected = (with_eos(text, eos) for text in (pair.chosen, pair.rejected))
        texts += [pair.prompt, pair.prompt + chosen, pair.prompt + rejected]
    ids = tokenizer(text=texts)["input_ids"]
    yield from zip(rows, zip(ids[0::3], ids[1::3], ids[2::3], strict=True), strict=True)


def _tokenize_chats(
    rows: list[int], pairs: dict[int, Pair], indices: list[int], tokenizer: PreTrainedTokenizerBase
) -> Iterable[Any]:
    kwargs = pairs[rows[0]].template_kwargs
    prompts = [pairs[i].prompt for i in rows]
    wholes = [pairs[i].prompt + side for i in rows for side in (pairs[i].chosen, pairs[i].rejected)]
    try:
        prompt_ids = _apply_template(tokenizer, prompts, add_generation_prompt=True, **kwargs)
        whole_ids = _apply_template(tokenizer, wholes, **kwargs)
        # One prompt tells for all: a template writes the beginning of an answer, or does not know the question.
        without = _apply_template(tokenizer, prompts[:1], add_generation_prompt=False, **kwargs)
    except Exception as error:  # templates raise whatever their authors chose
        if len(rows) > 1:  # one at a time, to find the row
            for i in rows:
                yield from _tokenize_chats([i], pairs, indices, tokenizer)
            return
        raise DataError(
            f"row {indices[rows[0]]}: the chat template refused the messages: {first_line(str(error) or repr(error))} "
            f"(roles: {', '.join(str(message['role']) for message in wholes[0])})"
        ) from error
    for i in rows:
        pairs[i].has_generation_prompt = prompt_ids[0] != without[0]
    yield from zip(rows, zip(prompt_ids, whole_ids[0::2], whole_ids[1::2], strict=True), strict=True)


def _apply_template(tokenizer: PreTrainedTokenizerBase, chats: list[Any], **kwargs: Any) -> list[list[int]]:
    return tokenizer.apply_chat_template(chats, tokenize=True, return_dict=True, **kwargs)["input_ids"]
