"""Rows of token ids → the sequences that a model scores, and which of them are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastdpo.data.terms import MARGIN_COLUMN, REFERENCE_COLUMNS
from fastdpo.data.truncation import cut


class TokenSequence(NamedTuple):
    """A context and the completion that is scored after it.

    Attributes:
        ids: of both.
        begin: where the completion begins.
        mask: 1 on the tokens of the completion that are scored; empty where all are.
    """

    ids: list[int]
    begin: int
    mask: list[int]

    @property
    def scored(self) -> int:
        """How many tokens are scored: none that has no predecessor."""
        first = max(self.begin, 1)
        return sum(self.mask[first - self.begin :]) if self.mask else len(self.ids) - first


class RowSequences(NamedTuple):
    """The sequences of a dataset row, or of several.

    Attributes:
        sequences: S of them.
        pairs: P times (chosen, rejected), as places in ``sequences``.
        weights: of the pairs.
        margins: what the pairs' margins are to exceed; empty where rows say nothing of it.
        rankings: of each row that has ranks, the places of its completions, the best first.
        ranking_rows: which row each ranking belongs to.
        references: the reference's log-probabilities of each pair's (chosen, rejected); empty where rows have none.
        ranked_references: those of the rankings; empty where rows have none.
        tokens: of the sequences of all rows, each with its context, also where rows have them in common.
        pair_rows: which row each pair belongs to.
        places: of each row's sequences, row after row, the place in ``sequences``.
    """

    sequences: list[TokenSequence]
    pairs: list[tuple[int, int]]
    weights: list[float]
    margins: list[float]
    rankings: list[list[int]]
    ranking_rows: list[int]
    references: list[tuple[float, float]]
    ranked_references: list[list[float]]
    tokens: int
    pair_rows: list[int]
    places: list[int]


@dataclass(frozen=True)
class Cut:
    """How sequences are cut: see :func:`fastdpo.data.truncation.cut`."""

    max_length: int | None = None
    truncation_mode: str = "keep_start"

    def __call__(self, prompt: list[int], completion: list[int], scored: list[int] | None) -> TokenSequence:
        """ValueError where nothing to score is left."""
        ids, mask = cut(prompt, completion, self.max_length, self.truncation_mode, scored)
        lost = len(prompt) + len(completion) - len(ids) if self.truncation_mode == "keep_end" else 0
        begin = max(0, min(len(prompt) - lost, len(ids)))
        # A token without a predecessor is not predicted.
        if not any(mask[1:]):
            raise ValueError(
                f"A row of {len(ids)} tokens has no completion left within max_length={self.max_length}. Pass the rows "
                "through fastdpo.data.prepare with the same max_length: it drops and counts them."
            )
        mask = mask[begin:]
        return TokenSequence(ids, begin, [] if all(mask) else mask)


def sequences_of(row: dict[str, Any], cut_to: Cut) -> RowSequences:
    """The sequences of a row of a pair, or of a group: a prompt with K completions, P pairs of which are compared.

    Completions of a group that are in no pair are left out, unless the group has ranks, which are of all. Completions
    that are equal are one sequence.

    Args:
        row: ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``, and if need be ``chosen_mask``, ``rejected_mask``,
            ``weight``, ``margin``, ``ref_chosen_logps`` and ``ref_rejected_logps``; or ``prompt_ids``,
            ``completion_ids`` and ``pairs``, and if need be ``completion_mask``, ``pair_weights``, ``ranks`` and
            ``ref_completion_logps``.
        cut_to: how long sequences may be.

    Raises:
        ValueError: nothing to score is left of a completion.
    """
    if "completion_ids" not in row:
        sides = [cut_to(row["prompt_ids"], row[f"{side}_ids"], row.get(f"{side}_mask")) for side in _SIDES]
        references = [tuple(row[name] for name in REFERENCE_COLUMNS)] if REFERENCE_COLUMNS[0] in row else []
        weight = row.get("weight")
        tokens = sum(len(side.ids) for side in sides)
        weights = [1.0 if weight is None else weight]
        margins = [row[MARGIN_COLUMN]] if row.get(MARGIN_COLUMN) is not None else []
        return RowSequences(sides, [(0, 1)], weights, margins, [], [], references, [], tokens, [0], [0, 1])
    masks, ranks = row.get("completion_mask"), row.get("ranks")
    in_pairs = {i for pair in row["pairs"] for i in pair}
    places: dict[int, int] = {}
    sequences: list[TokenSequence] = []
    for i, ids in enumerate(row["completion_ids"]):
        if i in in_pairs or ranks:
            sequence = cut_to(row["prompt_ids"], ids, masks[i] if masks else None)
            if sequence not in sequences:
                sequences.append(sequence)
            places[i] = sequences.index(sequence)
    ranking = sorted(range(len(ranks)), key=ranks.__getitem__) if ranks else []
    said = row.get("ref_completion_logps")
    return RowSequences(
        sequences=sequences,
        pairs=[(places[chosen], places[rejected]) for chosen, rejected in row["pairs"]],
        weights=list(row.get("pair_weights") or [1.0] * len(row["pairs"])),
        margins=[],
        rankings=[[places[i] for i in ranking]] if ranks else [],
        ranking_rows=[0] if ranks else [],
        references=[(said[chosen], said[rejected]) for chosen, rejected in row["pairs"]] if said else [],
        ranked_references=[[said[i] for i in ranking]] if said and ranks else [],
        tokens=sum(len(sequence.ids) for sequence in sequences),
        pair_rows=[0] * len(row["pairs"]),
        places=list(range(len(sequences))),
    )


def together(rows: Sequence[RowSequences], *, distinct: bool) -> RowSequences:
    """The sequences of several rows, in order; those that are equal once, where ``distinct``."""
    sequences: list[TokenSequence] = []
    known: dict[tuple[Any, ...], int] = {}
    places: list[list[int]] = []
    for row in rows:
        of_row = []
        for sequence in row.sequences:
            here = len(sequences)
            if distinct:
                here = known.setdefault((tuple(sequence.ids), sequence.begin, tuple(sequence.mask)), here)
            if here == len(sequences):
                sequences.append(sequence)
            of_row.append(here)
        places.append(of_row)
    each = list(zip(rows, places, strict=True))
    return RowSequences(
        sequences=sequences,
        pairs=[(at[chosen], at[rejected]) for row, at in each for chosen, rejected in row.pairs],
        weights=[weight for row in rows for weight in row.weights],
        margins=[margin for row in rows for margin in row.margins],
        rankings=[[at[i] for i in ranking] for row, at in each for ranking in row.rankings],
        ranking_rows=[i for i, row in enumerate(rows) for _ in row.rankings],
        references=[pair for row in rows for pair in row.references],
        ranked_references=[ranked for row in rows for ranked in row.ranked_references],
        tokens=sum(row.tokens for row in rows),
        pair_rows=[i for i, row in enumerate(rows) for _ in row.pairs],
        places=[place for of_row in places for place in of_row],
    )


_SIDES = ("chosen", "rejected")
