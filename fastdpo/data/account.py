"""What becomes of tokenised rows: which are kept, which are dropped or doubtful and why, and what they amount to."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import numpy as np
import pyarrow.compute as pc

from fastdpo.data.files import TOKEN_COLUMNS
from fastdpo.data.row_digests import row_digests
from fastdpo.data.summary import DROP_REASONS, DROP_REMEDIES, WARN_REASONS, DataSummary, LengthStats
from fastdpo.data.truncation import cut
from fastdpo.data.work import estimate_work


def account(
    tokenised: datasets.Dataset, max_length: int | None, truncation_mode: str, batch_size: int
) -> tuple[np.ndarray, DataSummary]:
    """The numbers of the rows that stay, and the summary of all.

    Args:
        tokenised: all rows, with the token columns, ``drop`` and ``warn``.
        max_length, truncation_mode: what will be cut.
        batch_size: pairs a step, for the estimate of its cost.
    """
    prompt, chosen, rejected = (_list_lengths(tokenised, name) for name in TOKEN_COLUMNS)
    drop = np.array(tokenised["drop"][:], dtype=object)
    if max_length is not None and truncation_mode == "keep_start":
        drop[(drop == "") & (prompt >= max_length)] = "prompt_too_long"
    kept = np.flatnonzero(drop == "")
    summary = DataSummary(len(tokenised), len(kept), max_length, truncation_mode)
    for reason in DROP_REASONS:
        _count(summary, summary.dropped, reason, np.flatnonzero(drop == reason))
    # A row that is too long counts here: these figures are what one chooses max_length by.
    measured = np.flatnonzero((drop == "") | (drop == "prompt_too_long"))
    if len(measured):
        summary.lengths = _length_stats(prompt[measured], chosen[measured], rejected[measured])
    limit = np.inf if max_length is None else max_length
    for name, completion in (("chosen", chosen), ("rejected", rejected)):
        summary.truncated[name] = int(np.sum((prompt + completion)[kept] > limit))
    if len(kept):
        summary.work = estimate_work(
            prompt[kept],
            chosen[kept],
            rejected[kept],
            max_length=max_length,
            truncation_mode=truncation_mode,
            batch_size=batch_size,
        )
    for reason, rows in _doubtful_rows(tokenised, kept, prompt, chosen, rejected, summary).items():
        _count(summary, summary.warned, reason, rows)
    return kept, summary


def _count(summary: DataSummary, counts: dict[str, int], reason: str, rows: Sequence[int]) -> None:
    if len(rows):
        counts[reason] = len(rows)
        summary.first_rows[reason] = [int(row) for row in rows[:3]]


def _length_stats(prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> dict[str, LengthStats]:
    named = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    named["longest"] = prompt + np.maximum(chosen, rejected)
    return {name: LengthStats.of(lengths) for name, lengths in named.items()}


def _doubtful_rows(
    tokenised: datasets.Dataset,
    kept: np.ndarray,
    prompt: np.ndarray,
    chosen: np.ndarray,
    rejected: np.ndarray,
    summary: DataSummary,
) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {reason: [] for reason in WARN_REASONS}
    warn = tokenised["warn"][:]
    for row in kept.tolist():
        for reason in warn[row]:
            found[reason].append(row)
        limit = summary.max_length
        too_long = limit is not None and prompt[row] + max(chosen[row], rejected[row]) > limit
        if too_long and "identical" not in warn[row]:
            ids = tokenised[row]
            sides = [cut(ids["prompt_ids"], ids[name], limit, summary.truncation_mode) for name in TOKEN_COLUMNS[1:]]
            if sides[0] == sides[1]:
                found["identical_after_truncation"].append(row)
    found["duplicate"], found["contradicted"] = _repeated_rows(tokenised, kept)
    return found


def _repeated_rows(tokenised: datasets.Dataset, kept: np.ndarray) -> tuple[list[int], list[int]]:
    """Rows that say again what a row before them says, and rows that say the opposite."""
    rows = tokenised.select(kept)
    names = list(map(bytes, row_digests(rows)))
    swapped = map(bytes, row_digests(rows, ("prompt_ids", "rejected_ids", "chosen_ids")))
    duplicates, contradictions, seen = [], [], set()
    for row, name, opposite in zip(kept.tolist(), names, swapped, strict=True):
        if name in seen:
            duplicates.append(row)
        elif opposite in seen:  # an identical pair is its own opposite, and was seen under its own name
            contradictions.append(row)
        seen.add(name)
    return duplicates, contradictions


def _list_lengths(dataset: datasets.Dataset, name: str) -> np.ndarray:
    return pc.list_value_length(dataset.data.column(name)).to_numpy()


def nothing_left_message(summary: DataSummary) -> str:
    main = max(summary.dropped, key=lambda reason: summary.dropped[reason])
    others = "".join(
        f" {count} more: {DROP_REASONS[reason]}." for reason, count in summary.dropped.items() if reason != main
    )
    limit = f" (max_length is {summary.max_length})" if main == "prompt_too_long" else ""
    return (
        f"No row is left of {summary.rows_in}. {summary.dropped[main]} dropped because {DROP_REASONS[main]}{limit}: "
        f"{DROP_REMEDIES[main]}.{others}"
    )


def strict_message(summary: DataSummary) -> str:
    """What strict preparation says of data that is not beyond doubt."""
    return f"strict: {'; '.join(summary.doubts())}."
