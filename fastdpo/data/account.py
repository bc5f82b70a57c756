"""What becomes of tokenised rows: which are kept, which are dropped or doubtful and why, and what they amount to."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastdpo.data.reasons import DROP_REASONS, DROP_REMEDIES, NOTES, WARN_REASONS
from fastdpo.data.row_digests import MASK_COLUMNS, pair_hashes
from fastdpo.data.summary import DataSummary, LengthStats
from fastdpo.data.terms import TOKEN_COLUMNS
from fastdpo.data.truncation import cut
from fastdpo.data.work import estimate_work

_MOST_DETAILS = 5


def account(
    tokenised: datasets.Dataset, max_length: int | None, truncation_mode: str, batch_size: int
) -> tuple[np.ndarray, DataSummary]:
    """The numbers of the rows that stay, and the summary of all.

    Args:
        tokenised: all rows, with the token columns, ``drop`` and ``warn``, and mask columns if any has a mask.
        max_length, truncation_mode: what will be cut.
        batch_size: pairs a step, for the estimate of its cost.
    """
    prompt, chosen, rejected = (_list_lengths(tokenised, name) for name in TOKEN_COLUMNS)
    dropped, stays = dropped_rows(tokenised)
    if max_length is not None and truncation_mode == "keep_start":
        too_long = stays & (prompt + _unscored_beginning(tokenised) >= max_length)
        dropped["prompt_too_long"] = np.flatnonzero(too_long)
    # A row that is too long counts here: these figures are what one chooses max_length by.
    measured = np.flatnonzero(stays)
    stays[dropped["prompt_too_long"]] = False
    kept = np.flatnonzero(stays)
    summary = DataSummary(len(tokenised), len(kept), max_length, truncation_mode)
    for reason, rows in dropped.items():
        count_rows(summary, summary.dropped, reason, rows)
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
    found = found_in_rows(tokenised, stays, summary)
    identical = _identical_once_cut(
        tokenised, kept, np.minimum(prompt + chosen, limit), np.minimum(prompt + rejected, limit), found, summary
    )
    found["identical_after_truncation"] = np.array(identical, np.int64)
    found["duplicate"], found["contradicted"] = repeated_rows(tokenised, kept)
    for reasons, counts in ((WARN_REASONS, summary.warned), (NOTES, summary.noted)):
        for reason in reasons:
            count_rows(summary, counts, reason, found.get(reason, ()))
    return kept, summary


def dropped_rows(tokenised: datasets.Dataset) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The rows that each reason dropped, and bool [rows]: which stay."""
    column = tokenised.data.column("drop")
    dropped = {reason: rows_where(pc.equal(column, reason)) for reason in DROP_REASONS}
    stays = np.ones(len(tokenised), bool)
    for rows in dropped.values():
        stays[rows] = False
    return dropped, stays


def count_rows(summary: DataSummary, counts: dict[str, int], reason: str, rows: np.ndarray | Sequence[int]) -> None:
    """Count rows under a reason, if there are any, and keep the first of them."""
    if len(rows):
        counts[reason] = len(rows)
        summary.first_rows[reason] = [int(row) for row in rows[:3]]


def _length_stats(prompt: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> dict[str, LengthStats]:
    named = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    named["longest"] = prompt + np.maximum(chosen, rejected)
    return {name: LengthStats.of(lengths) for name, lengths in named.items()}


def found_in_rows(tokenised: datasets.Dataset, stays: np.ndarray, summary: DataSummary) -> dict[str, np.ndarray]:
    """For each reason that stands with a row that stays, the rows; their details go into the summary."""
    found: dict[str, list[np.ndarray]] = {}
    first = 0
    for chunk in tokenised.data.column("warn").chunks:
        rows = pc.list_parent_indices(chunk).to_numpy() + first
        reasons = pc.list_flatten(chunk)
        for reason in pc.unique(reasons).to_pylist():
            here = rows[pc.equal(reasons, reason).to_numpy(zero_copy_only=False)]
            here = here[stays[here]]
            if len(here):
                name, _, detail = reason.partition(":")
                found.setdefault(name, []).append(here)
                known = summary.details.setdefault(name, []) if detail else []
                if detail and detail not in known and len(known) < _MOST_DETAILS:
                    known.append(detail)
        first += len(chunk)
    return {name: np.unique(np.concatenate(rows)) for name, rows in found.items()}


def _identical_once_cut(
    tokenised: datasets.Dataset,
    kept: np.ndarray,
    chosen: np.ndarray,
    rejected: np.ndarray,
    found: dict[str, np.ndarray],
    summary: DataSummary,
) -> list[int]:
    """Rows whose two sequences, of these lengths once cut, differ in what is cut alone."""
    limit = summary.max_length
    if limit is None:
        return []
    candidates = kept[(chosen[kept] == limit) & (rejected[kept] == limit)]
    candidates = np.setdiff1d(candidates, found.get("identical", ()))
    same = []
    for row in candidates.tolist():
        ids = tokenised[row]
        sides = [cut(ids["prompt_ids"], ids[name], limit, summary.truncation_mode) for name in TOKEN_COLUMNS[1:]]
        if sides[0] == sides[1]:
            same.append(row)
    return same


def repeated_rows(tokenised: datasets.Dataset, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows that say again what a row before them says, and rows that say the opposite."""
    name, opposite = pair_hashes(tokenised.select(kept))
    order = np.argsort(name, kind="stable")
    ordered = name[order]

    def first_with(hashes: np.ndarray) -> np.ndarray:
        """The first row of each hash; the number of rows where there is none."""
        places = np.searchsorted(ordered, hashes)
        there = places < len(ordered)
        there[there] = ordered[places[there]] == hashes[there]
        return np.where(there, order[np.where(there, places, 0)], len(ordered)) if len(ordered) else places

    here = np.arange(len(kept))
    repeated = first_with(name) < here
    # An identical pair is its own opposite, and was seen under its own name.
    contradicted = ~repeated & (first_with(opposite) < here)
    return kept[repeated], kept[contradicted]


def _unscored_beginning(tokenised: datasets.Dataset) -> np.ndarray:
    """How many tokens stand before the first that counts, in the completion where these are more."""
    most = np.zeros(len(tokenised), np.int64)
    for name in MASK_COLUMNS:
        if name in tokenised.column_names:
            masked = rows_where(pc.greater(pc.list_value_length(tokenised.data.column(name)), 0))
            for row in masked.tolist():
                most[row] = max(most[row], tokenised[row][name].index(1))
    return most


def rows_where(condition: pa.ChunkedArray) -> np.ndarray:
    """The numbers of the rows for which it holds."""
    return np.flatnonzero(condition.to_numpy())


def _list_lengths(dataset: datasets.Dataset, name: str) -> np.ndarray:
    lengths: np.ndarray = pc.list_value_length(dataset.data.column(name)).to_numpy()
    return lengths


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
