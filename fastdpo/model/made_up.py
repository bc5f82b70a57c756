"""Made-up pairs, by which a model is looked at before it is trained on real ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fastdpo.data.collator import PreferenceCollator
from fastdpo.data.sequences import TokenSequence
from fastdpo.model.head_calls import IGNORE_INDEX
from fastdpo.model.packing import PackedRow, pack_tree
from fastdpo.model.row_collator import split_padded
from fastdpo.model.scoring import Scorer
from fastdpo.model.tree import Prefixes, in_a_row, side_by_side

# Tokens of prompt, chosen and rejected.
_SHORT_PAIRS = ((7, 5, 4), (1, 3, 6), (4, 1, 9))
# The short pairs, and the tree.
SHORT = len(_SHORT_PAIRS) + 1
_FILLER = (200, 28, 28)
# Tokens beyond a length that layers may change at.
_BEYOND = 24
# Most tokens of sequences and rows where training knows no limit.
UNLIMITED = 4096

Group = list[TokenSequence]


@dataclass(frozen=True)
class MadeUp:
    """Groups of sequences, and the row in which they are looked at.

    Attributes:
        groups: sequences that have something in common, distinct ones, the short ones first.
        order: which group stands where in a row: each at least once.
    """

    groups: list[Group]
    order: list[int]

    def changed(self) -> MadeUp:
        """The same, but for the tokens of the first completion of all."""
        (ids, begin, mask), *others = self.groups[0]
        new = [*ids[:begin], *ids[: begin - 1 : -1]]
        if new == ids:
            new[-1] ^= 1
        return replace(self, groups=[[TokenSequence(new, begin, mask), *others], *self.groups[1:]])

    def row(self, layout: str, device: torch.device, order: Sequence[int] | None = None) -> PackedRow:
        """The groups in a packed row, in this order or in another; in ``shared`` each is a tree of its own."""
        groups = [self.groups[i] for i in (self.order if order is None else order)]
        as_ids = [[np.array(sequence.ids) for sequence in group] for group in groups]
        make = side_by_side if layout == "repeated" else lambda ids: Prefixes(ids, least=1).tree()
        row = pack_tree([sequence for group in groups for sequence in group], in_a_row([make(ids) for ids in as_ids]))
        return row.to(device)

    def padded(self, scorer: Scorer, device: torch.device) -> list[Tensor]:
        """Log-probabilities of the sequences' scored tokens by the model in padded rows, group by group."""
        sequences = [sequence for group in self.groups for sequence in group]
        widths = [len(sequence.ids) for sequence in sequences]
        found: dict[int, Tensor] = {}
        # Like lengths together, so that a long sequence makes no others long.
        for indices in split_padded([(1, width) for width in widths], 2 * max(widths)):
            batch = PreferenceCollator(pad_token_id=0).pad([sequences[i] for i in indices])
            batch = {name: values.to(device) for name, values in batch.items()}
            labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORE_INDEX)
            out = scorer.head(scorer.root, batch["input_ids"], batch["attention_mask"], labels)
            found.update(zip(indices, out.logps[out.mask].split(out.mask.sum(1).tolist()), strict=True))
        return [found[i] for i in range(len(sequences))]

    def of_row(self, logps: Tensor, row: PackedRow, order: Sequence[int] | None = None) -> list[tuple[int, Tensor]]:
        """A row's log-probabilities, sequence by sequence, each with its place in what :meth:`padded` returns."""
        begins = [0]
        for group in self.groups:
            begins.append(begins[-1] + len(group))
        places = [place for i in (self.order if order is None else order) for place in range(*begins[i : i + 2])]
        return list(zip(places, row.of_sequences(logps).split(row.cu_seqlens.diff().tolist()), strict=True))


def made_up(
    vocabulary: int,
    lengths: Sequence[int] = (),
    *,
    longest: int = UNLIMITED,
    row_tokens: int = UNLIMITED,
    seed: int = 0,
) -> MadeUp:
    """Pairs, and a tree, for a model whose layers may change at these lengths.

    Where ``longest`` lets a sequence be longer than one of them, there is a pair that is; where ``row_tokens`` lets a
    row be, the row is filled up until short ones stand beyond it.

    Args:
        vocabulary: the model's entries.
        lengths: rising.
        longest: most tokens of a sequence.
        row_tokens: most tokens of a row.
        seed: of the tokens.
    """
    rng = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(count)]

    def pair(prompt: int, chosen: int, rejected: int) -> Group:
        context = tokens(prompt)
        return [TokenSequence(context + tokens(count), prompt, []) for count in (chosen, rejected)]

    groups = [pair(*counts) for counts in _SHORT_PAIRS]
    groups.append(_tree(tokens))
    last = 0
    for length in lengths:
        # Not beyond what training has; lengths that lie close together are passed by one pair.
        if length + 2 <= longest and length + _BEYOND > last + last // 4:
            last = min(longest, length + _BEYOND)
            prompt = max(1, length - 3)
            groups.append(pair(prompt, last - prompt, max(1, last - prompt - 2)))
    order = list(range(len(groups)))
    count = MadeUp(groups, order).row("shared", torch.device("cpu")).segments.length
    beyond = max((length for length in lengths if length < row_tokens), default=0)
    if count <= beyond:
        filler = _FILLER if sum(_FILLER[:2]) <= longest else _SHORT_PAIRS[0]
        copies = -((count - beyond) // sum(filler))
        groups.append(pair(*filler))
        order += [len(groups) - 1] * copies
    return MadeUp(groups, [*order, *range(SHORT)] if len(order) > SHORT else order)


def _tree(tokens: Callable[[int], list[int]]) -> Group:
    """Two prompts that begin alike, each with completions that part within, branch by branch, or end within another.

    Branches have two tokens at least: the last of a sequence predicts nothing, and would show no fault.
    """
    system = tokens(3)
    one, other = [*system, *tokens(2)], [*system, *tokens(2)]
    begun, further, away = tokens(2), tokens(4), tokens(4)
    completions = (
        (one, begun + further[:2] + tokens(3)),
        (one, begun + further),
        (one, begun + tokens(3)),
        (one, begun + further[:1]),
        (other, tokens(6)),
        (other, away),
        (other, away[:2] + tokens(3)),
    )
    return [TokenSequence(prompt + completion, len(prompt), []) for prompt, completion in completions]
