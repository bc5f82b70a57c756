"""Rows as a person checks them: decoded, coloured by what the mask makes of each token, and cut where training cuts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from fastdpo.data.mask import decode
from fastdpo.data.summary import DROP_REASONS, WARN_REASONS, DataSummary
from fastdpo.data.truncation import cut

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT, CHOSEN, REJECTED, CUT = "cyan", "green", "red", "dim strike"
_SHOWN = 400  # characters of each part of a row


def legend() -> Text:
    """What the colours mean."""
    return Text.assemble(
        ("prompt, not scored", PROMPT), " · ", ("chosen, scored", CHOSEN), " · ", ("rejected, scored", REJECTED), " · ",
        ("cut off", CUT),
    )  # fmt: skip


def worst_rows(summary: DataSummary, count: int) -> list[int]:
    """The first row of each reason, then the second of each, and so on; at most ``count``, each once."""
    lists = [summary.first_rows[reason] for reason in (*summary.dropped, *summary.warned)]
    ranked = [rows[i] for i in range(max(map(len, lists), default=0)) for rows in lists if i < len(rows)]
    return list(dict.fromkeys(ranked))[:count]


def reasons_of(row: int, summary: DataSummary) -> list[str]:
    """Why a row among ``first_rows`` was dropped, or is doubtful, in words."""
    dropped = [f"dropped: {DROP_REASONS[name]}" for name in summary.dropped if row in summary.first_rows[name]]
    return dropped + [f"but: {WARN_REASONS[name]}" for name in summary.warned if row in summary.first_rows[name]]


def show_row(
    number: int, raw: dict[str, Any], tokens: dict[str, Any], tokenizer: PreTrainedTokenizerBase, summary: DataSummary
) -> Group:
    """A rich renderable of one row.

    Args:
        number: the row's, in the input.
        raw: the row as it was read.
        tokens: the row of :func:`fastdpo.data.examine`.
        tokenizer: to decode with.
        summary: what was found.
    """
    lengths = ", ".join(f"{name} {len(tokens[f'{name}_ids']):,}" for name in ("prompt", "chosen", "rejected"))
    found = "; ".join(reasons_of(number, summary))
    heading = (
        Text(f"row {number}", "bold").append(f"  {found}" if found else "", "yellow").append(f"  ({lengths})", "dim")
    )
    if not tokens["chosen_ids"]:  # it never came to tokens
        fields = [f"{name}: {_shorten(json.dumps(value, ensure_ascii=False))}" for name, value in raw.items()]
        return Group(heading, *(Text(visible(line)) for line in fields), "")
    sides = [
        Text.assemble(*_spans(tokens, name, style, tokenizer, summary))
        for name, style in (("chosen", CHOSEN), ("rejected", REJECTED))
    ]
    return Group(heading, *sides, "")


def _spans(
    tokens: dict[str, Any], side: str, style: str, tokenizer: PreTrainedTokenizerBase, summary: DataSummary
) -> list[tuple[str, str]]:
    """(text, style) of what is cut, of the prompt and of the completion, in the order of the tokens."""
    prompt, completion = tokens["prompt_ids"], tokens[f"{side}_ids"]
    ids, mask = cut(prompt, completion, summary.max_length, summary.truncation_mode)
    scored = sum(mask)
    kept_prompt = ids[: len(ids) - scored]
    kept_completion = ids[len(ids) - scored :]
    lost = (prompt + completion)[len(ids) :] if summary.truncation_mode == "keep_start" else []
    lost_before = (prompt + completion)[: -len(ids)] if summary.truncation_mode == "keep_end" else []
    parts = [(lost_before, CUT, True), (kept_prompt, PROMPT, True), (kept_completion, style, False), (lost, CUT, False)]
    return [(visible(_shorten(decode(tokenizer, ids), keep_end)), look) for ids, look, keep_end in parts if ids]


def _shorten(text: str, keep_end: bool = False) -> str:
    if len(text) <= _SHOWN:
        return text
    left_out = f"… {len(text) - _SHOWN:,} characters …"
    half = _SHOWN // 4  # the end that touches the boundary is what one looks at
    head, tail = (half, _SHOWN - half) if keep_end else (_SHOWN - half, half)
    return f"{text[:head]}{left_out}{text[-tail:]}"


def visible(text: str) -> str:
    """Control characters by their codes, so that a terminal shows them and does not obey them."""
    return "".join(char if char >= " " and char != "\x7f" or char in "\n\t" else f"\\x{ord(char):02x}" for char in text)
