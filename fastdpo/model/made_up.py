"""Made-up pairs, by which a model is looked at before it is trained on real ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdpo.data.collator import PreferenceCollator
from fastdpo.model.head_calls import IGNORE_INDEX
from fastdpo.model.packing import PackedRow, RowCollator, split_padded
from fastdpo.model.scoring import Scorer

Row = dict[str, list[int]]

# Tokens of prompt, chosen and rejected.
_SHORT_PAIRS = ((7, 5, 4), (1, 3, 6), (4, 1, 9))
SHORT = len(_SHORT_PAIRS)
_FILLER = (200, 28, 28)
# Tokens beyond a length that layers may change at.
_BEYOND = 24
# Most tokens of sequences and rows where training knows no limit.
UNLIMITED = 4096


@dataclass(frozen=True)
class MadeUp:
    """Pairs, and the row in which they are looked at.

    Attributes:
        pairs: distinct ones, the short ones first.
        order: which pair stands where in a row: each at least once.
    """

    pairs: list[Row]
    order: list[int]

    def changed(self) -> MadeUp:
        """The same pairs, but for the first one's chosen tokens."""
        first = {**self.pairs[0], "chosen_ids": self.pairs[0]["chosen_ids"][::-1]}
        if first == self.pairs[0]:
            first["chosen_ids"] = [*first["chosen_ids"][:-1], first["chosen_ids"][-1] ^ 1]
        return MadeUp([first, *self.pairs[1:]], self.order)

    def row(self, layout: str, device: torch.device, order: Sequence[int] | None = None) -> PackedRow:
        """The pairs in a packed row, in this order or in another."""
        rows = [self.pairs[i] for i in (self.order if order is None else order)]
        row: PackedRow = RowCollator(layout, PreferenceCollator(pad_token_id=0))(rows)["micro_batches"][0]["row"]
        return row.to(device)

    def padded(self, scorer: Scorer, device: torch.device) -> list[Tensor]:
        """Log-probabilities of the pairs' scored tokens by the model in padded rows, pair by pair: chosen, rejected."""
        widths = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in self.pairs]
        found: dict[int, list[Tensor]] = {}
        # Like lengths together, so that a long pair makes no others long.
        for indices in split_padded(widths, 2 * max(widths)):
            batch = PreferenceCollator(pad_token_id=0)([self.pairs[i] for i in indices])
            batch = {name: values.to(device) for name, values in batch.items()}
            labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORE_INDEX)
            out = scorer.head(scorer.root, batch["input_ids"], batch["attention_mask"], labels)
            sequences = out.logps[out.mask].split(out.mask.sum(1).tolist())
            for place, i in enumerate(indices):
                found[i] = [sequences[place], sequences[len(indices) + place]]
        return [logps for i in range(len(self.pairs)) for logps in found[i]]

    def of_row(self, logps: Tensor, row: PackedRow, order: Sequence[int] | None = None) -> list[tuple[int, Tensor]]:
        """A row's log-probabilities, sequence by sequence, each with its place in what :meth:`padded` returns."""
        order = self.order if order is None else order
        sequences = logps.split(row.cu_seqlens.diff().tolist())
        return [
            (2 * i + side, sequences[side * len(order) + place]) for side in (0, 1) for place, i in enumerate(order)
        ]


def made_up(
    vocabulary: int,
    lengths: Sequence[int] = (),
    *,
    longest: int = UNLIMITED,
    row_tokens: int = UNLIMITED,
    seed: int = 0,
) -> MadeUp:
    """Pairs for a model whose layers may change at these lengths.

    Where ``longest`` lets a sequence be longer than one of them, there is a pair that is; where ``row_tokens`` lets a
    row be, the row is filled up until short pairs stand beyond it.

    Args:
        vocabulary: the model's entries.
        lengths: rising.
        longest: most tokens of a sequence.
        row_tokens: most tokens of a row.
        seed: of the tokens.
    """
    rng = random.Random(seed)

    def pair(prompt: int, chosen: int, rejected: int) -> Row:
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        counts = (prompt, chosen, rejected)
        return {name: [rng.randrange(vocabulary) for _ in range(n)] for name, n in zip(names, counts, strict=True)}

    pairs = [pair(*counts) for counts in _SHORT_PAIRS]
    last = 0
    for length in lengths:
        # Not beyond what training has; lengths that lie close together are passed by one pair.
        if length + 2 <= longest and length + _BEYOND > last + last // 4:
            last = min(longest, length + _BEYOND)
            prompt = max(1, length - 3)
            pairs.append(pair(prompt, last - prompt, max(1, last - prompt - 2)))
    order = list(range(len(pairs)))
    tokens = sum(len(ids) for row in pairs for ids in row.values())
    beyond = max((length for length in lengths if length < row_tokens), default=0)
    if tokens <= beyond:
        filler = _FILLER if sum(_FILLER[:2]) <= longest else _SHORT_PAIRS[0]
        copies = -((tokens - beyond) // sum(filler))
        pairs.append(pair(*filler))
        order += [len(pairs) - 1] * copies
    return MadeUp(pairs, [*order, *range(SHORT)] if len(order) > SHORT else order)
