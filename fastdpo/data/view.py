"""Rows as a person checks them: as they are written, and beside it decoded, coloured by what the mask makes of each
token, and cut where training cuts."""

from __future__ import annotations

import json
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fastdpo.data.encode import decode
from fastdpo.data.summary import DataSummary
from fastdpo.data.truncation import cut
from fastdpo.data.visible import visible

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
    dropped = [f"dropped: {summary.words(name)}" for name in summary.dropped if row in summary.first_rows[name]]
    return dropped + [f"but: {summary.words(name)}" for name in summary.warned if row in summary.first_rows[name]]


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
    if "completion_ids" in tokens:
        return _show_group(number, raw, tokens, tokenizer, summary)
    lengths = ", ".join(f"{name} {len(tokens[f'{name}_ids']):,}" for name in ("prompt", "chosen", "rejected"))
    heading = _heading(number, lengths, summary)
    if not tokens["chosen_ids"]:  # it never came to tokens
        return Group(heading, *_fields(raw), "")
    table = Table(box=SIMPLE, show_edge=False, pad_edge=False, header_style="dim")
    table.add_column("as written", ratio=1)
    table.add_column("as rendered", ratio=1)
    prompt = [] if isinstance(raw.get("prompt"), str) and not isinstance(raw["chosen"], str) else [raw.get("prompt")]
    for name, style in (("chosen", CHOSEN), ("rejected", REJECTED)):
        written = Text("\n").join(as_written(value) for value in (*prompt, raw[name]) if value)
        table.add_row(written, Text.assemble(*_spans(tokens, name, style, tokenizer, summary)))
    return Group(heading, table, "")


def _heading(number: int, lengths: str, summary: DataSummary) -> Text:
    found = "; ".join(reasons_of(number, summary))
    return Text(f"row {number}", "bold").append(f"  {found}" if found else "", "yellow").append(f"  ({lengths})", "dim")


def _fields(raw: dict[str, Any]) -> list[Text]:
    """A row that never came to tokens."""
    return [Text(visible(f"{name}: {_shorten(_json(value))}")) for name, value in raw.items()]


def _show_group(
    number: int, raw: dict[str, Any], tokens: dict[str, Any], tokenizer: PreTrainedTokenizerBase, summary: DataSummary
) -> Group:
    """The answers of a group that are compared, each with what it is better and worse than."""
    answers = tokens["completion_ids"]
    lengths = f"prompt {len(tokens['prompt_ids']):,}, answers {', '.join(f'{len(ids):,}' for ids in answers)}"
    heading = _heading(number, lengths, summary)
    if not answers:  # a row has null in the columns of other forms of a group
        return Group(heading, *_fields({name: value for name, value in raw.items() if value is not None}), "")
    table = Table(box=SIMPLE, show_edge=False, pad_edge=False, header_style="dim")
    table.add_column("answer")
    table.add_column("as rendered", ratio=1)
    masks = tokens.get("completion_mask") or [[]] * len(answers)
    for i, (ids, mask) in enumerate(zip(answers, masks, strict=True)):
        better = [str(rejected) for chosen, rejected in tokens["pairs"] if chosen == i]
        worse = [str(chosen) for chosen, rejected in tokens["pairs"] if rejected == i]
        said = [f"better than {', '.join(better)}"] * bool(better) + [f"worse than {', '.join(worse)}"] * bool(worse)
        one = {"prompt_ids": tokens["prompt_ids"], "chosen_ids": ids, "chosen_mask": mask}
        style = CHOSEN if better else REJECTED
        table.add_row("\n".join([str(i), *said]), Text.assemble(*_spans(one, "chosen", style, tokenizer, summary)))
    return Group(heading, table, "")


def as_written(value: Any) -> Text:
    """A text, or messages with all of their fields."""
    if isinstance(value, str):
        return Text(visible(_shorten(value)))
    lines = []
    for message in value:
        content = message.get("content")
        shown = content if isinstance(content, str) else _json(content)
        text = Text(visible(f"{message['role']}: "), "bold").append(visible(_shorten(shown)), "not bold")
        for name, value in message.items():
            if name not in ("role", "content") and value is not None:
                said = _shorten(_json(value))
                text.append(visible(f"\n  {name}: {said}"), "not bold")
        lines.append(text)
    return Text("\n").join(lines)


def _spans(
    tokens: dict[str, Any], side: str, style: str, tokenizer: PreTrainedTokenizerBase, summary: DataSummary
) -> list[tuple[str, str]]:
    """(text, style) of what is cut, of what is context and of what is scored, in the order of the tokens."""
    whole, mode = tokens["prompt_ids"] + tokens[f"{side}_ids"], summary.truncation_mode
    ids, mask = cut(tokens["prompt_ids"], tokens[f"{side}_ids"], summary.max_length, mode, tokens.get(f"{side}_mask"))
    lost = len(whole) - len(ids)
    parts = [([token for token, _ in run], style if scored else PROMPT, not scored) for scored, run in groupby(
        zip(ids, mask, strict=True), key=lambda pair: pair[1]
    )]  # fmt: skip
    if lost:
        parts = [*parts, (whole[-lost:], CUT, False)] if mode == "keep_start" else [(whole[:lost], CUT, True), *parts]
    return [(visible(_shorten(decode(tokenizer, part), keep_end)), look) for part, look, keep_end in parts]


def _json(value: Any) -> str:
    """JSON text of a value; of an image's bytes, how many."""

    def other(inner: Any) -> str:
        return f"{len(inner):,} bytes" if isinstance(inner, bytes) else str(inner)

    return json.dumps(value, ensure_ascii=False, default=other)


def _shorten(text: str, keep_end: bool = False) -> str:
    if len(text) <= _SHOWN:
        return text
    left_out = f"… {len(text) - _SHOWN:,} characters …"
    half = _SHOWN // 4  # the end that touches the boundary is what one looks at
    head, tail = (half, _SHOWN - half) if keep_end else (_SHOWN - half, half)
    return f"{text[:head]}{left_out}{text[-tail:]}"
