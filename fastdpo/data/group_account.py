"""What becomes of tokenised groups: which are kept, which are dropped or doubtful and why, and what they amount to."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from fastdpo.data.account import count_rows, dropped_rows, found_in_rows
from fastdpo.data.group_limits import within_limit
from fastdpo.data.reasons import DROP_REASONS, NOTES, WARN_REASONS
from fastdpo.data.summary import DataSummary, GroupFacts, LengthStats
from fastdpo.data.truncation import cut
from fastdpo.data.work import cut_lengths, estimate_group_work


@dataclass
class GroupLengths:
    """Lengths of G groups of A answers, all groups' one after another, and which of these are in P pairs.

    Attributes:
        prompt: [G] tokens.
        answers: [A] tokens.
        group_of: [A] which group each answer is of.
        pairs: [P, 2] places among all answers, chosen and rejected.
    """

    prompt: np.ndarray
    answers: np.ndarray
    group_of: np.ndarray
    pairs: np.ndarray


def account_groups(
    tokenised: datasets.Dataset, max_length: int | None, truncation_mode: str, batch_size: int
) -> tuple[datasets.Dataset, np.ndarray, DataSummary]:
    """The rows without answers of which ``max_length`` leaves nothing, and as :func:`fastdpo.data.account.account` of
    pairs the numbers of those that stay, and the summary of all.

    Args:
        tokenised: all rows, with a group's columns, ``drop``, ``warn`` and ``left_out``.
        max_length, truncation_mode: what will be cut.
        batch_size: groups a step, for the estimate of its cost.
    """
    dropped, stays = dropped_rows(tokenised)
    before = tokenised
    if max_length is not None and truncation_mode == "keep_start":  # the other one leaves the end, which is scored
        tokenised, lost = within_limit(tokenised, stays, max_length)
        dropped["prompt_too_long"] = lost
        stays[lost] = False
    kept = np.flatnonzero(stays)
    summary = DataSummary(len(tokenised), len(kept), max_length, truncation_mode)
    for reason, rows in dropped.items():
        count_rows(summary, summary.dropped, reason, rows)
    # A row that is too long counts in the lengths: these figures are what one chooses max_length by.
    measured = np.union1d(kept, dropped["prompt_too_long"])
    if len(measured):
        of = lengths_of(before.select(measured))
        longest = of.prompt + _most_in_groups(of.answers, of.group_of, len(of.prompt))
        named = {"prompt": of.prompt, "answer": of.answers, "longest": longest}
        summary.lengths = {name: LengthStats.of(lengths) for name, lengths in named.items()}
    left_out = Counter(reason for row in tokenised["left_out"] for reason in row)
    kept_rows = tokenised.select(kept)
    describe_groups(kept_rows, summary, batch_size, {_words(reason): n for reason, n in left_out.items()})
    found = found_in_rows(tokenised, stays, summary)
    found["identical_after_truncation"] = kept[_identical_once_cut(kept_rows, max_length, truncation_mode)]
    found["duplicate"], found["contradicted"] = (kept[places] for places in _repeated(kept_rows))
    for reasons, counts in ((WARN_REASONS, summary.warned), (NOTES, summary.noted)):
        for reason in reasons:
            count_rows(summary, counts, reason, found.get(reason, ()))
    return tokenised, kept, summary


def describe_groups(rows: datasets.Dataset, summary: DataSummary, batch_size: int, left_out: dict[str, int]) -> None:
    """Put into the summary what groups that are kept hold, and what a step of them costs."""
    if not len(rows):
        summary.groups = GroupFacts(0, 0, 0, 0, False, left_out)
        return
    of = lengths_of(rows)
    limit = summary.max_length
    if limit is not None:
        whole = of.prompt[of.group_of] + of.answers
        summary.truncated = {"answer": int(np.sum(whole > limit))}
    weighted = "pair_weights" in rows.column_names
    most = int(np.bincount(of.group_of).max())
    summary.groups = GroupFacts(len(of.prompt), len(of.answers), len(of.pairs), most, weighted, left_out)
    prompts, answers = cut_lengths(of.prompt[of.group_of], of.answers, limit, summary.truncation_mode)
    summary.work = estimate_group_work(prompts, answers, of.group_of, of.pairs, batch_size)


def lengths_of(rows: datasets.Dataset) -> GroupLengths:
    """Of prepared groups."""
    prompt = pc.list_value_length(rows.data.column("prompt_ids")).to_numpy() if len(rows) else np.zeros(0, int)
    table = rows.select_columns(["completion_ids", "pairs"]).with_format("arrow")
    answers, counts, pairs, pair_counts = [], [], [], []
    for batch in table.iter(batch_size=1000):
        completions = batch.column("completion_ids").combine_chunks()
        answers.append(pc.list_value_length(completions.flatten()).to_numpy(zero_copy_only=False))
        counts.append(pc.list_value_length(completions).to_numpy(zero_copy_only=False))
        of_pairs = batch.column("pairs").combine_chunks()
        pairs.append(of_pairs.flatten().flatten().to_numpy(zero_copy_only=False).reshape(-1, 2))
        pair_counts.append(pc.list_value_length(of_pairs).to_numpy(zero_copy_only=False))
    sizes = np.concatenate(counts)
    begins = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    places = np.concatenate(pairs) + np.repeat(begins, np.concatenate(pair_counts))[:, None]
    return GroupLengths(prompt, np.concatenate(answers), np.repeat(np.arange(len(sizes)), sizes), places)


def _most_in_groups(values: np.ndarray, group_of: np.ndarray, groups: int) -> np.ndarray:
    most = np.zeros(groups, values.dtype)
    np.maximum.at(most, group_of, values)
    return most


def _identical_once_cut(rows: datasets.Dataset, limit: int | None, mode: str) -> list[int]:
    """Places of groups in which a pair's two sequences differ in what is cut alone."""
    if limit is None or not len(rows):
        return []
    of = lengths_of(rows)
    is_cut = of.prompt[of.group_of] + of.answers > limit
    candidates = of.group_of[of.pairs[is_cut[of.pairs].any(1), 0]].tolist() if len(of.pairs) else []
    same = []
    for place in sorted(set(candidates)):
        row = rows[place]
        whole = [tuple(cut(row["prompt_ids"], ids, limit, mode)[0]) for ids in row["completion_ids"]]
        if any(whole[chosen] == whole[rejected] for chosen, rejected in row["pairs"]):
            same.append(place)
    return same


def _repeated(rows: datasets.Dataset) -> tuple[list[int], list[int]]:
    """Places of groups that say again what one before them says; and of others with a pair that is the opposite of one
    before them, or of another of their own.
    """
    seen: set[int] = set()
    said: set[int] = set()
    repeated, contradicted = [], []
    place = 0
    names = [name for name in ("prompt_ids", "completion_ids", "completion_mask", "pairs") if name in rows.column_names]
    for batch in rows.select_columns(names).iter(batch_size=1000):
        for values in zip(*batch.values(), strict=True):
            name = hash(_frozen(values))
            pairs, opposites = _pair_hashes(dict(zip(batch, values, strict=True)))
            said |= pairs
            if name in seen:
                repeated.append(place)
            elif said & opposites:
                contradicted.append(place)
            seen.add(name)
            place += 1
    return repeated, contradicted


def _pair_hashes(row: dict[str, Any]) -> tuple[set[int], set[int]]:
    """Of a group's pairs, and of these the other way round: equal tokens that count alike have equal ones."""
    masks = row.get("completion_mask") or [[]] * len(row["completion_ids"])
    # Where the prompt ends is a matter of the group's other answers, too.
    answers = [
        hash(_frozen(cut(row["prompt_ids"], ids, None, "", mask)))
        for ids, mask in zip(row["completion_ids"], masks, strict=True)
    ]
    pairs = [(answers[chosen], answers[rejected]) for chosen, rejected in row["pairs"]]
    return {hash((a, b)) for a, b in pairs}, {hash((b, a)) for a, b in pairs}


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, (list, tuple)) else value


def _words(reason: str) -> str:
    return DROP_REASONS.get(reason, reason)
