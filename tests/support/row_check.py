"""Rows → tokens, and whether they are what transformers makes of them step by step."""

from __future__ import annotations

import copy
import datetime
import json
import re
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from fastdpo.data.rows import common_prefix_length
from fastdpo.data.settings import Preparation
from fastdpo.data.terms import DataError
from fastdpo.data.tokens import RowTokenizer, Tokens

DAY = datetime.date(2026, 3, 1)
SIDES = ("chosen", "rejected")


def tokenize(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast, **options: Any) -> Tokens:
    preparation = Preparation(template_date=DAY, **options)
    return RowTokenizer(tokenizer, preparation, "prompt" not in row).tokenize([copy.deepcopy(row)], [0])[0]


def scored_text(tokens: Tokens, side: str, tokenizer: PreTrainedTokenizerFast) -> str:
    ids, mask = getattr(tokens, side), getattr(tokens, f"{side}_mask")
    return tokenizer.decode([token for token, counts in zip(ids, mask or [1] * len(ids), strict=True) if counts])


def put_right(messages: list[dict[str, Any]], notes: list[str]) -> list[dict[str, Any]]:
    """What the notes say was done, done by hand."""
    messages = copy.deepcopy(messages)
    for message in messages:
        calls = [call["function"] for call in message.get("tool_calls") or ()]
        for call in calls:
            if "arguments_parsed" in notes and isinstance(call["arguments"], str):
                call["arguments"] = json.loads(call["arguments"])
            if "arguments_written" in notes and isinstance(call["arguments"], dict):
                call["arguments"] = json.dumps(call["arguments"], ensure_ascii=False)
        if "content_filled" in notes and message.get("content") is None:
            message["content"] = ""
        if "parts_joined" in notes and isinstance(message.get("content"), list):
            message["content"] = "".join(part["text"] for part in message["content"])
        if "parts_made" in notes and isinstance(message.get("content"), str):
            message["content"] = [{"type": "text", "text": message["content"]}]
    return messages


def straightforward(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast, notes: list[str]) -> list[list[int]]:
    """The ids of the prompt, and of both wholes, as transformers makes them."""

    def ids(messages: list[dict[str, Any]], opened: bool = False) -> list[int]:
        return tokenizer.apply_chat_template(
            put_right(messages, notes), tools=row.get("tools"), add_generation_prompt=opened, tokenize=True
        )["input_ids"]

    return [ids(row["prompt"], True), *(ids(row["prompt"] + row[side]) for side in SIDES)]


def tags(messages: list[dict[str, Any]], roles: tuple[str, ...]) -> set[str]:
    said = json.dumps([message for message in messages if message["role"] in roles])
    return set(re.findall(r"[USATRK]a?\d+z", said))


def check(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> str:
    """Compare a row's tokens with what they should be; what became of it."""
    try:
        tokens = tokenize(row, tokenizer)
    except DataError as error:
        assert "the chat template refused the messages" in str(error)
        with pytest.raises(Exception, match="."):  # as it refuses transformers
            straightforward(row, tokenizer, [])
        return "refused"
    if tokens.drop in ("answer_left_out", "prompt_scored", "turns_not_told_apart"):
        return tokens.drop
    assert tokens.drop == ""
    prompt, *wholes = straightforward(row, tokenizer, tokens.warn)
    boundary = min(common_prefix_length(prompt, whole) for whole in wholes)
    assert tokens.prompt == prompt[:boundary]
    assert ("prompt_shortened" in tokens.warn) == (boundary < len(prompt))
    for side, whole in zip(SIDES, wholes, strict=True):
        ids = tokens.prompt + getattr(tokens, side)
        assert ids == whole[: len(ids)]
        assert len(ids) == len(whole) or {"header_cut", "between_not_scored"} & set(tokens.warn)
        scored = scored_text(tokens, side, tokenizer)
        said = tags(row[side], ("assistant",))
        if "reasoning_left_out" in tokens.warn:
            said = {tag for tag in said if tag[0] != "R"}
        there = set(re.findall(r"[USATRK]a?\d+z", scored))
        # A thought that the template opens in the prompt begins after the tag of nothing: tags stand within.
        assert said <= there, (said - there, scored)
        assert not there & tags(row["prompt"] + row[side], ("user", "system", "tool")), scored
    return "kept"
