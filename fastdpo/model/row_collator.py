"""Batches of dataset rows → the micro-batches that they are taken in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastdpo.data.collator import PreferenceCollator, comparisons
from fastdpo.data.sequences import Cut, RowSequences, sequences_of, together
from fastdpo.data.vision_collator import VisionCollator
from fastdpo.model.packing import pack
from fastdpo.model.padded_parts import forwards_of
from fastdpo.model.tree import LEAST_SHARED, Prefixes


@dataclass
class RowCollator:
    """Rows of ``prepare`` → the micro-batches that a batch of them is taken in.

    Called with a list of B rows, of a pair each or of a group each (see :func:`fastdpo.data.sequences.sequences_of`),
    it returns ``{"micro_batches": [...]}``, dicts of

    - ``rows``: int64 [b], which of the B rows they hold. Each row is in one of them.
    - what :func:`fastdpo.data.collator.comparisons` says of them and of the S sequences.
    - ``row``: a :class:`fastdpo.model.packing.PackedRow` of the sequences; or, where the layout is ``padded``, the
      tensors of ``PreferenceCollator``, each of S rows, and ``forwards``, see
      :func:`fastdpo.model.padded_parts.forwards_of`, where these are taken in several.

    In layout ``shared`` the sequences are distinct, over all rows of the micro-batch; in the others over each group.

    Args:
        layout: one of :data:`fastdpo.model.packing.LAYOUTS`.
        padded: makes the padded batches, and knows how long a sequence may be.
        max_tokens: most tokens of a micro-batch, padding included; None for one micro-batch of all rows. A row that
            alone has more is a micro-batch of its own.
        forward_cost: what a forward of padded rows costs beside its tokens, in tokens, by which it is divided into
            several of like lengths; None to leave it whole.
        least_shared, masked_cost: what is worth sharing in layout ``shared``: ``least`` and ``masked`` of
            :class:`fastdpo.model.tree.Prefixes`.
    """

    layout: str
    padded: PreferenceCollator
    max_tokens: int | None = None
    forward_cost: int | None = None
    least_shared: int = LEAST_SHARED
    masked_cost: float = 0.0

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
        cut = Cut(self.padded.max_length, self.padded.truncation_mode)
        of_rows = [sequences_of(row, cut) for row in rows]
        return {"micro_batches": [self._collate(rows, of_rows, indices) for indices in self._split(of_rows)]}

    def _split(self, rows: list[RowSequences]) -> list[list[int]]:
        if self.max_tokens is None:
            return [list(range(len(rows)))]
        if self.layout == "padded":
            sizes = [(len(row.sequences), self._padded_width(row)) for row in rows]
            return split_padded(sizes, self.max_tokens)
        if self.layout == "repeated":
            return split_packed([row.tokens for row in rows], self.max_tokens)
        ids = [[s.ids for s in row.sequences] for row in rows]
        return split_shared(ids, self.max_tokens, self.least_shared, self.masked_cost)

    def _padded_width(self, row: RowSequences) -> int:
        width = max(len(sequence.ids) for sequence in row.sequences)
        return width + -width % (self.padded.pad_to_multiple_of or 1)

    def _collate(self, rows: list[dict[str, Any]], of_rows: list[RowSequences], indices: list[int]) -> dict[str, Any]:
        batch = together([of_rows[i] for i in indices], distinct=self.layout == "shared")
        found = comparisons(batch, torch.tensor(indices))
        if self.layout == "padded":
            if isinstance(self.padded, VisionCollator):
                return found | _with_images(self.padded, [rows[i] for i in indices])
            return found | self._padded(batch)
        shared = self.layout == "shared"
        least, masked = self.least_shared, self.masked_cost
        row = pack(batch.sequences, shared=shared, least=least, masked=masked, places=batch.places)
        return found | {"row": row}

    def _padded(self, batch: RowSequences) -> dict[str, Any]:
        found: dict[str, Any] = dict(self.padded.pad(batch.sequences))
        if self.forward_cost is not None:
            multiple = self.padded.pad_to_multiple_of or 1
            forwards = forwards_of(found["attention_mask"], self.forward_cost, multiple)
            if forwards is not None:
                found["forwards"] = forwards
        return found


def _with_images(padded: VisionCollator, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The padded batch of pairs, in the order in which their images are: chosen sequences, then rejected ones."""
    places = torch.arange(len(rows))
    return {**padded(rows), "pairs": torch.stack([places, places + len(rows)], dim=1)}


def split_packed(tokens: Sequence[int], budget: int) -> list[list[int]]:
    """Which dataset rows go into which packed row: the longest first, each into the first row that has room for it.

    Args:
        tokens: what each dataset row takes up.
        budget: most tokens of a packed row that holds more than one of them.

    Returns:
        Indices of ``tokens``, each once, rising within a packed row.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(tokens)), key=lambda i: -tokens[i]):
        target = next((r for r, free in enumerate(room) if tokens[i] <= free), None)
        if target is None:
            rows.append([i])
            room.append(budget - tokens[i])
        else:
            rows[target].append(i)
            room[target] -= tokens[i]
    return [sorted(row) for row in rows]


def split_shared(
    rows: Sequence[Sequence[list[int]]], budget: int, least: int = LEAST_SHARED, masked: float = 0.0
) -> list[list[int]]:
    """The same where sequences share what they begin with: each into the packed row that it has most in common with.

    Args:
        rows: the sequences of each dataset row.
        budget: most tokens of a packed row that holds more than one of them.
        least, masked: see :class:`fastdpo.model.tree.Prefixes`.
    """
    prefixes = Prefixes([np.array(ids, dtype=np.int64) for row in rows for ids in row], least, masked)
    sizes = [len(row) for row in rows]
    members: list[list[int]] = []
    for size in sizes:
        begin = members[-1][-1] + 1 if members else 0
        members.append(list(range(begin, begin + size)))
    of_sequences = prefixes.families()
    families = [{of_sequences[s] for s in of_row} for of_row in members]
    alone = [prefixes.tokens(of_row) for of_row in members]
    bins: list[_Bin] = []
    for i in sorted(range(len(rows)), key=lambda i: -alone[i]):
        best: tuple[int, _Bin] | None = None
        for candidate in bins:
            if families[i] & candidate.families:
                tokens = prefixes.tokens(candidate.members + members[i])
            else:
                tokens = candidate.tokens + alone[i]
            if tokens <= budget and (best is None or tokens - candidate.tokens < best[0] - best[1].tokens):
                best = tokens, candidate
        if best is None:
            bins.append(_Bin([i], list(members[i]), set(families[i]), alone[i]))
        else:
            tokens, target = best
            target.rows.append(i)
            target.members += members[i]
            target.families |= families[i]
            target.tokens = tokens
    return [sorted(b.rows) for b in bins]


@dataclass
class _Bin:
    """A packed row that is being filled: dataset rows, their sequences, the families of these, the tokens of all."""

    rows: list[int]
    members: list[int]
    families: set[int]
    tokens: int


def split_padded(sizes: Sequence[tuple[int, int]], budget: int) -> list[list[int]]:
    """The same for padded batches, which are as wide as the widest in them. Like widths go together.

    Args:
        sizes: of each dataset row, how many sequences it has, and the width of the longest.
        budget: most tokens of a batch that holds more than one of them, padding included.
    """
    batches: list[list[int]] = []
    height = width = 0
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i][1]):
        height += sizes[i][0]
        if batches and height * width <= budget:
            batches[-1].append(i)
        else:
            height, width = sizes[i]
            batches.append([i])
    return [sorted(batch) for batch in batches]
