"""Pairs → rows without padding, in which each prompt stands once.

A row holds whole pairs, ``[prompt | chosen | rejected | prompt | chosen | rejected | …]``. Positions restart, so that
chosen and rejected both follow the prompt; the prompt's last position predicts the first token of both, so the index
of scored positions names it twice. What attends to what is said by :class:`fastdpo.model.segments.Segments`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, compress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo.data.collator import PreferenceCollator
from fastdpo.data.terms import REFERENCE_COLUMNS
from fastdpo.data.truncation import cut
from fastdpo.model.padded_parts import forwards_of
from fastdpo.model.segments import Segment, Segments

# How a batch of pairs is laid out. "shared": packed rows, each prompt once. "repeated": packed rows, each completion
# with its own copy of the prompt. "padded": two padded rows a pair.
LAYOUTS = ("shared", "repeated", "padded")
PACKINGS = ("auto", *LAYOUTS)


class Pair(NamedTuple):
    """A pair as it goes into a row: two sequences, each a context and the completion that is scored.

    The contexts are the prompt. They differ where ``keep_end`` cut the two sequences to different beginnings.
    """

    chosen_context: list[int]
    chosen: list[int]
    rejected_context: list[int]
    rejected: list[int]
    # 1 on the tokens of a completion that are scored; empty where all are.
    chosen_mask: list[int] = []  # noqa: RUF012 (never changed)
    rejected_mask: list[int] = []  # noqa: RUF012

    @property
    def has_one_prompt(self) -> bool:
        """Whether there is a prompt that both completions follow, and so can share."""
        return len(self.chosen_context) > 0 and self.chosen_context == self.rejected_context

    @property
    def sequence_tokens(self) -> int:
        """Tokens of both sequences."""
        return sum(map(len, self[:4]))

    def row_tokens(self, shared: bool) -> int:
        """Tokens that it takes up in a row."""
        return self.sequence_tokens - (len(self.rejected_context) if shared and self.has_one_prompt else 0)


@dataclass(frozen=True)
class PackedRow:
    """B pairs in one row of N tokens, K of which positions are scored.

    Attributes:
        input_ids, position_ids: [1, N] int64.
        segments: what each token attends to.
        scored: [K] int64, positions in the row, sequence after sequence: the B chosen ones, then the B rejected ones.
        targets: [K] int64, what each of them predicts.
        cu_seqlens: [2B + 1] int64, the sequences' bounds in ``scored``.
        sequence_tokens: tokens of the 2B sequences, each with its prompt. At least N.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Segments
    scored: Tensor
    targets: Tensor
    cu_seqlens: Tensor
    sequence_tokens: int

    @property
    def pairs(self) -> int:
        """B."""
        return (len(self.cu_seqlens) - 1) // 2

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedRow:
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedRow:
        return self._map(lambda x: x.pin_memory())

    def _map(self, change: Callable[[Any], Any]) -> PackedRow:
        names = ("input_ids", "position_ids", "segments", "scored", "targets", "cu_seqlens")
        return replace(self, **{name: change(getattr(self, name)) for name in names})


def cut_pair(row: dict[str, Any], max_length: int | None, truncation_mode: str) -> Pair:
    """A row of :func:`fastdpo.data.prepare`, each sequence cut to ``max_length`` as ``PreferenceCollator`` does.

    Raises:
        ValueError: nothing to score is left of a completion.
    """
    sides, masks = [], []
    for side in ("chosen", "rejected"):
        prompt, completion, scored = row["prompt_ids"], row[f"{side}_ids"], row.get(f"{side}_mask")
        ids, mask = cut(prompt, completion, max_length, truncation_mode, scored)
        lost = len(prompt) + len(completion) - len(ids) if truncation_mode == "keep_end" else 0
        context = max(0, min(len(prompt) - lost, len(ids)))
        # A token without a predecessor is not predicted.
        if not any(mask[1:]):
            raise ValueError(
                f"A row of {len(ids)} tokens has no completion left within max_length={max_length}. Pass the rows "
                "through fastdpo.data.prepare with the same max_length: it drops and counts them."
            )
        sides += [ids[:context], ids[context:]]
        masks.append([] if all(mask[context:]) else mask[context:])
    return Pair(*sides, *masks)


def pack(pairs: Sequence[Pair], *, shared: bool) -> PackedRow:
    """One row of these pairs, in order.

    Args:
        pairs: at least one; in each completion at least one token has a predecessor.
        shared: a prompt that both completions follow stands once. Otherwise, and for a pair whose completions follow
            different prompts, it stands before each completion.
    """
    layout = _Layout()
    scored: list[tuple[list[int], list[int]]] = []  # (positions, targets), pair by pair: chosen, rejected
    for pair in pairs:
        if shared and pair.has_one_prompt:
            prompt = layout.add(pair.chosen_context)
            chosen = layout.add(pair.chosen, after=prompt)
            rejected = layout.add(pair.rejected, after=prompt)
            layout.close(prompt.start, chosen.stop)
            layout.close(rejected.start, rejected.stop, prefix=prompt)
            scored += [
                _predictors(prompt, chosen, pair.chosen, pair.chosen_mask),
                _predictors(prompt, rejected, pair.rejected, pair.rejected_mask),
            ]
        else:
            for context, completion, mask in (
                (pair.chosen_context, pair.chosen, pair.chosen_mask),
                (pair.rejected_context, pair.rejected, pair.rejected_mask),
            ):
                prompt = layout.add(context)
                own = layout.add(completion, after=prompt)
                layout.close(prompt.start, own.stop)
                scored.append(_predictors(prompt, own, completion, mask))
    in_order = scored[0::2] + scored[1::2]
    return PackedRow(
        input_ids=torch.tensor([layout.ids]),
        position_ids=torch.tensor([layout.positions]),
        segments=Segments(layout.segments),
        scored=torch.tensor([t for positions, _ in in_order for t in positions]),
        targets=torch.tensor([t for _, targets in in_order for t in targets]),
        cu_seqlens=torch.tensor([0, *accumulate(len(targets) for _, targets in in_order)]),
        sequence_tokens=sum(pair.sequence_tokens for pair in pairs),
    )


class _Layout:
    """A row that is being filled."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.segments: list[Segment] = []

    def add(self, ids: list[int], after: range = range(0)) -> range:
        """Append tokens whose positions follow those of ``after``; where they are in the row."""
        here = range(len(self.ids), len(self.ids) + len(ids))
        self.ids += ids
        self.positions += range(len(after), len(after) + len(ids))
        return here

    def close(self, begin: int, end: int, prefix: range = range(0)) -> None:
        self.segments.append(Segment(begin, end, prefix.start, prefix.stop))


def _predictors(prompt: range, completion: range, ids: list[int], mask: list[int]) -> tuple[list[int], list[int]]:
    """The positions that predict a completion, and its tokens; the first has none where there is no prompt."""
    positions = [*prompt[-1:], *completion[:-1]]
    targets = ids[len(ids) - len(positions) :]
    if mask:
        mask = mask[len(ids) - len(positions) :]
        return list(compress(positions, mask)), list(compress(targets, mask))
    return positions, targets


# --------------------------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------------------------


@dataclass
class RowCollator:
    """Rows of ``prepare`` → the micro-batches that a batch of pairs is taken in.

    Called with a list of B rows, it returns ``{"micro_batches": [...]}``, dicts of

    - ``pairs``: int64 [b], which of the B pairs they hold. Each pair is in one of them.
    - ``row``: a :class:`PackedRow`; or, where the layout is ``padded``, the tensors of ``PreferenceCollator``, and
      ``forwards``, see :func:`fastdpo.model.padded_parts.forwards_of`, where these are taken in several.
    - ``ref_chosen_logps``, ``ref_rejected_logps``: float64 [b], when the rows have them.

    Args:
        layout: one of :data:`LAYOUTS`.
        padded: makes the padded batches, and knows how long a sequence may be.
        max_tokens: most tokens of a micro-batch, padding included; None for one micro-batch of all pairs. A pair that
            alone has more is a micro-batch of its own.
        forward_cost: what a forward of padded rows costs beside its tokens, in tokens, by which it is divided into
            several of like lengths; None to leave it whole.
    """

    layout: str
    padded: PreferenceCollator
    max_tokens: int | None = None
    forward_cost: int | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
        pairs = [cut_pair(row, self.padded.max_length, self.padded.truncation_mode) for row in rows]
        return {"micro_batches": [self._collate(rows, pairs, chosen) for chosen in self._split(pairs)]}

    def _split(self, pairs: list[Pair]) -> list[list[int]]:
        if self.max_tokens is None:
            return [list(range(len(pairs)))]
        if self.layout == "padded":
            return split_padded([self._padded_width(pair) for pair in pairs], self.max_tokens)
        return split_packed([pair.row_tokens(self.layout == "shared") for pair in pairs], self.max_tokens)

    def _padded_width(self, pair: Pair) -> int:
        width = max(len(pair.chosen_context) + len(pair.chosen), len(pair.rejected_context) + len(pair.rejected))
        return width + -width % (self.padded.pad_to_multiple_of or 1)

    def _collate(self, rows: list[dict[str, Any]], pairs: list[Pair], indices: list[int]) -> dict[str, Any]:
        chosen = [rows[i] for i in indices]
        if self.layout == "padded":
            whole: dict[str, Any] = {**self.padded(chosen), "pairs": torch.tensor(indices)}
            if self.forward_cost is not None:
                multiple = self.padded.pad_to_multiple_of or 1
                forwards = forwards_of(whole["attention_mask"], self.forward_cost, multiple)
                return whole if forwards is None else {**whole, "forwards": forwards}
            return whole
        batch = {
            "row": pack([pairs[i] for i in indices], shared=self.layout == "shared"),
            "pairs": torch.tensor(indices),
        }
        for name in REFERENCE_COLUMNS:
            if name in rows[0]:
                batch[name] = torch.tensor([row[name] for row in chosen], dtype=torch.float64)
        return batch


def split_packed(tokens: Sequence[int], budget: int) -> list[list[int]]:
    """Which pairs go into which row: the longest first, each into the first row that has room for it.

    Args:
        tokens: what each pair takes up.
        budget: most tokens of a row that holds more than one pair.

    Returns:
        Indices of ``tokens``, each once, rising within a row.
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


def split_padded(widths: Sequence[int], budget: int) -> list[list[int]]:
    """The same for padded batches: two rows a pair, as wide as the longest in the batch. Like lengths go together."""
    batches: list[list[int]] = []
    for i in sorted(range(len(widths)), key=lambda i: -widths[i]):
        if batches and 2 * (len(batches[-1]) + 1) * widths[batches[-1][0]] <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return [sorted(batch) for batch in batches]
