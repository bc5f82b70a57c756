"""Token ids → padded batches: the one place where sequences are cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastdpo.data.sequences import Cut, RowSequences, TokenSequence, sequences_of, together
from fastdpo.data.terms import MARGIN_COLUMN, REFERENCE_COLUMNS, WEIGHT_COLUMN
from fastdpo.data.truncation import check_truncation, cut


def comparisons(batch: RowSequences, rows: torch.Tensor) -> dict[str, Any]:
    """Which of S sequences are compared, and what is known of them.

    - ``rows``: as given.
    - ``pairs``: int64 [P, 2], the (chosen, rejected) of each pair, as places among the sequences.
    - ``pair_rows``: int64 [P], which row each pair belongs to.
    - ``pair_weights``: float64 [P], where any is not 1.
    - ``pair_margins``: float64 [P], where the rows have margins.
    - ``sequence_tokens``: the tokens of all rows' sequences, each with its prompt.
    - ``pair_tokens``: the scored tokens of both sides of all pairs.
    - ``ref_chosen_logps``, ``ref_rejected_logps``: float64 [P], when the rows have them.
    - ``rankings``: int64 [R, K], when rows have ranks: the sequences of each, the best first, filled up with -1; and
      ``ranking_rows``: int64 [R], which row each belongs to.
    - ``ref_ranked_logps``: float64 [R, K], filled up with 0, when these rows have the reference's log-probabilities.

    Args:
        batch: the sequences, of one or more rows.
        rows: int64, the numbers of these rows.
    """
    scored = [sequence.scored for sequence in batch.sequences]
    found: dict[str, Any] = {
        "rows": rows,
        "pairs": torch.tensor(batch.pairs),
        "pair_rows": rows[torch.tensor(batch.pair_rows)],
        "sequence_tokens": batch.tokens,
        "pair_tokens": sum(scored[i] for pair in batch.pairs for i in pair),
    }
    if any(weight != 1 for weight in batch.weights):
        found["pair_weights"] = torch.tensor(batch.weights, dtype=torch.float64)
    if batch.margins:
        found["pair_margins"] = torch.tensor(batch.margins, dtype=torch.float64)
    for name, values in zip(REFERENCE_COLUMNS, zip(*batch.references, strict=True), strict=False):
        found[name] = torch.tensor(values, dtype=torch.float64)
    if batch.rankings:
        found["rankings"] = torch.tensor(_filled(batch.rankings, -1))
        found["ranking_rows"] = rows[torch.tensor(batch.ranking_rows)]
    if batch.ranked_references:
        found["ref_ranked_logps"] = torch.tensor(_filled(batch.ranked_references, 0.0), dtype=torch.float64)
    return found


def _filled(lists: Sequence[Sequence[Any]], value: Any) -> list[list[Any]]:
    width = max(map(len, lists))
    return [[*items, *[value] * (width - len(items))] for items in lists]


@dataclass
class PreferenceCollator:
    """Rows of ``prepare`` → a padded batch; the one place where sequences are cut.

    Called with a list of B rows of pairs, it returns a dict of tensors, chosen rows first, then rejected, padded on the
    right:

    - ``input_ids``, ``attention_mask``, ``completion_mask``: int64 [2B, T]. ``completion_mask`` is 1 on the tokens of
      the completion, and 0 on prompt and padding.
    - ``ref_chosen_logps``, ``ref_rejected_logps``: float64 [B], when the rows have them.
    - ``pair_weights``: float64 [B], when the rows have weights; ``pair_margins`` likewise.

    Of rows of which any is a group, the tensors have a row for each of its S answers, and beside them is what
    :func:`comparisons` says.

    Args:
        pad_token_id: what to pad ``input_ids`` with.
        max_length: most tokens of prompt + completion; None for no limit.
        truncation_mode: ``keep_start`` drops the end of what is too long, ``keep_end`` the beginning.
        pad_to_multiple_of: T is rounded up to a multiple of this.

    Raises:
        ValueError: ``max_length`` or ``truncation_mode`` is not valid; or, when called, a row has no completion token
            left (``prepare`` with the same ``max_length`` drops such rows).
    """

    pad_token_id: int
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None

    def __post_init__(self) -> None:
        check_truncation(self.max_length, self.truncation_mode)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        if any("completion_ids" in row for row in rows):
            cut_to = Cut(self.max_length, self.truncation_mode)
            together_ = together([sequences_of(row, cut_to) for row in rows], distinct=False)
            return self.pad(together_.sequences) | comparisons(together_, torch.arange(len(rows)))
        sequences = [
            cut(row["prompt_ids"], row[f"{side}_ids"], self.max_length, self.truncation_mode, row.get(f"{side}_mask"))
            for side in ("chosen", "rejected")
            for row in rows
        ]
        for ids, mask in sequences:
            if not any(mask):
                raise ValueError(
                    f"A row of {len(ids)} tokens has no completion left within max_length={self.max_length}. "
                    "Pass the rows through fastdpo.data.prepare with the same max_length: it drops and counts them."
                )
        batch = {
            "input_ids": self._stack([ids for ids, _ in sequences], self.pad_token_id),
            "attention_mask": self._stack([[1] * len(ids) for ids, _ in sequences], 0),
            "completion_mask": self._stack([mask for _, mask in sequences], 0),
        }
        for name in REFERENCE_COLUMNS:
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in rows], dtype=torch.float64)
        weights = [row.get(WEIGHT_COLUMN) for row in rows]
        if any(weight is not None for weight in weights):
            said = [1.0 if weight is None else weight for weight in weights]
            batch["pair_weights"] = torch.tensor(said, dtype=torch.float64)
        if rows[0].get(MARGIN_COLUMN) is not None:
            batch["pair_margins"] = torch.tensor([row[MARGIN_COLUMN] for row in rows], dtype=torch.float64)
        return batch

    def pad(self, sequences: Sequence[TokenSequence]) -> dict[str, torch.Tensor]:
        """The three tensors of these sequences, a row each."""
        masks = [[0] * s.begin + (s.mask or [1] * (len(s.ids) - s.begin)) for s in sequences]
        return {
            "input_ids": self._stack([s.ids for s in sequences], self.pad_token_id),
            "attention_mask": self._stack([[1] * len(s.ids) for s in sequences], 0),
            "completion_mask": self._stack(masks, 0),
        }

    def _stack(self, lists: list[list[int]], padding: int) -> torch.Tensor:
        width = max(map(len, lists))
        if self.pad_to_multiple_of:
            width += -width % self.pad_to_multiple_of
        out = torch.full((len(lists), width), padding, dtype=torch.int64)
        for row, values in zip(out, lists, strict=True):
            row[: len(values)] = torch.tensor(values, dtype=torch.int64)
        return out
