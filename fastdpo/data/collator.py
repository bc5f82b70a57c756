"""Token ids → padded batches: the one place where sequences are cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastdpo.data.sequences import TokenSequence
from fastdpo.data.terms import REFERENCE_COLUMNS
from fastdpo.data.truncation import check_truncation, cut


@dataclass
class PreferenceCollator:
    """Rows of ``prepare`` → a padded batch; the one place where sequences are cut.

    Called with a list of B rows, it returns a dict of tensors, chosen rows first, then rejected, padded on the right:

    - ``input_ids``, ``attention_mask``, ``completion_mask``: int64 [2B, T]. ``completion_mask`` is 1 on the tokens of
      the completion, and 0 on prompt and padding.
    - ``ref_chosen_logps``, ``ref_rejected_logps``: float64 [B], when the rows have them.

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

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
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
