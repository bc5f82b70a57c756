"""A cleaned file of pairs: what training would use of a set, in fastdpo's own form."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from fastdpo.data.account import repeated_rows
from fastdpo.data.chats import Chat
from fastdpo.data.forms import in_form
from fastdpo.data.images import IMAGE_COLUMNS
from fastdpo.data.rows import Row, read_row
from fastdpo.data.terms import DataError

# Of the forms that a template takes, those that any template takes as well.
_KEPT_FORMS = ("arguments_parsed", "parts_joined", "content_filled")
_OWN = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")


@dataclass
class Fixed:
    """What was written.

    Attributes:
        rows: how many.
        left_out: how many were not, by reason.
        columns_left_out: columns of types that JSON has no form for.
    """

    rows: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    columns_left_out: list[str] = field(default_factory=list)


def write_fixed(dataset: datasets.Dataset, tokenised: datasets.Dataset, kept: np.ndarray, path: Path) -> Fixed:
    """Write the rows that teach something to a JSONL file, one object a line.

    Left out are rows that are dropped, pairs of which both sides are the same, and those that say what a row before
    them says, or its opposite. Messages are written in the form that they were put right to; the prompt of message
    lists gets its own field; what follows a completion's last answer, and the prompt where completions repeat it, are
    cut off. Other columns stay as they are.

    Args:
        dataset: as it was read.
        tokenised, kept: what :func:`fastdpo.data.examine` made of it.
        path: the file.
    """
    fixed = Fixed()
    duplicates, opposites = (set(rows.tolist()) for rows in repeated_rows(tokenised, kept))
    stays = set(kept.tolist())
    implicit = "prompt" not in dataset.column_names
    found = zip(_rows_of(dataset), tokenised["warn"], strict=True)
    with path.open("w", encoding="utf-8") as file:
        for number, (row, warn) in enumerate(found):
            reason = ""
            if number not in stays:
                reason = "dropped"
            elif "identical" in warn:
                reason = "identical"
            elif number in duplicates or number in opposites:
                reason = "duplicate" if number in duplicates else "contradicted"
            if reason:
                fixed.left_out[reason] = fixed.left_out.get(reason, 0) + 1
                continue
            file.write(json.dumps(_in_own_form(row, warn, implicit, number, fixed), ensure_ascii=False) + "\n")
            fixed.rows += 1
    return fixed


def _rows_of(dataset: datasets.Dataset) -> Iterator[dict[str, Any]]:
    for batch in dataset.iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def _in_own_form(row: dict[str, Any], warn: list[str], implicit: bool, number: int, fixed: Fixed) -> dict[str, Any]:
    read = read_row(row, implicit, f"row {number}")
    out: dict[str, Any] = {name: row[name] for name in ("prompt", "chosen", "rejected") if name in row}
    if isinstance(read, Row) and isinstance(read.pair, Chat):
        pair = read.pair
        forms = tuple(name for name in _KEPT_FORMS if name in warn)
        sides = [pair.chosen, pair.rejected]
        if "prompt_repeated" in warn:
            sides = [side[len(pair.prompt) :] for side in sides]
        messages = [in_form(part, forms) for part in (pair.prompt, *sides)]
        out = dict(zip(("prompt", "chosen", "rejected"), messages, strict=True))
        out |= {"tools": pair.tools} if pair.tools is not None else {}
        out |= {"chat_template_kwargs": pair.kwargs} if pair.kwargs else {}
    for name, value in row.items():
        if name in _OWN or name in fixed.columns_left_out:
            continue
        try:
            json.dumps(value)
        except TypeError as error:
            if name in IMAGE_COLUMNS:
                raise DataError(
                    f"row {number}: column {name!r} has an image's bytes, which a JSONL file cannot hold; write the "
                    "images to files, and name these."
                ) from error
            fixed.columns_left_out.append(name)
        else:
            out[name] = value
    return out
