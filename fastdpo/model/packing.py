"""Sequences → a row without padding, in which what they begin with in common stands once.

A row holds whole sequences, ``[prompt | chosen | rejected | prompt | …]``. Positions restart, so that all completions
of a prompt follow it. The prompt's last position predicts the first token of each of them, so the index of scored
positions names it several times; a token that several sequences have in common is predicted once. What attends to what
is said by :class:`fastdpo.model.segments.Segments`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdpo.data.sequences import TokenSequence
from fastdpo.model.segments import Segments
from fastdpo.model.tree import LEAST_SHARED, Prefixes, Tree, side_by_side

# How a batch is laid out. "shared": packed rows, each beginning once. "repeated": packed rows, each completion with its
# own copy of the prompt. "padded": padded rows, a sequence each.
LAYOUTS = ("shared", "repeated", "padded")
PACKINGS = ("auto", *LAYOUTS)


@dataclass(frozen=True)
class PackedRow:
    """S sequences in one row of N tokens, E tokens of which are scored.

    Attributes:
        input_ids, position_ids: [1, N] int64.
        segments: what each token attends to.
        scored: [E] int64, the positions of the row that predict these tokens.
        targets: [E] int64, the tokens.
        edge_index: [K] int64, places in ``scored``: the scored tokens of the first sequence in order, of the second, …;
            None where these are all in order.
        cu_seqlens: [S + 1] int64, the sequences' bounds in ``edge_index``.
        token_index: [M] int64, places in the row: the tokens of all sequences, as padded rows have them; None where
            these are those of the row.
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: Segments
    scored: Tensor
    targets: Tensor
    edge_index: Tensor | None
    cu_seqlens: Tensor
    token_index: Tensor | None = None

    def of_sequences(self, values: Tensor) -> Tensor:
        """[K], sequence after sequence, of what is known of the scored tokens [E]."""
        return values if self.edge_index is None else values.index_select(0, self.edge_index)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedRow:
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedRow:
        return self._map(lambda x: x.pin_memory())

    def _map(self, change: Callable[[Any], Any]) -> PackedRow:
        return replace(self, **{name: change(value) for name, value in vars(self).items() if value is not None})


def pack(
    sequences: Sequence[TokenSequence],
    *,
    shared: bool,
    least: int = LEAST_SHARED,
    masked: float = 0.0,
    places: Sequence[int] | None = None,
) -> PackedRow:
    """One row of these sequences.

    Args:
        sequences: at least one; in each at least one token that is scored has a predecessor.
        shared: what sequences begin with in common stands once. Otherwise each is there in full.
        least, masked: see :class:`fastdpo.model.tree.Prefixes`.
        places: which of the sequences padded rows have, each at least once; by default once.
    """
    ids = [np.array(sequence.ids, dtype=np.int64) for sequence in sequences]
    return pack_tree(sequences, Prefixes(ids, least, masked).tree() if shared else side_by_side(ids), places)


def pack_tree(sequences: Sequence[TokenSequence], tree: Tree, places: Sequence[int] | None = None) -> PackedRow:
    """One row of sequences that have been laid out; ``places`` as in :func:`pack`."""
    # Which scored token stands at each position of the row; -1 for none.
    edge_at = np.full(len(tree.ids), -1)
    scored: list[np.ndarray] = []
    edges: list[np.ndarray] = []
    at: list[np.ndarray] = []
    count = 0
    for sequence, path in zip(sequences, tree.paths, strict=True):
        here = np.concatenate([np.arange(begin, end) for begin, end in path])
        at.append(here)
        # The first token of all has nothing to be predicted from.
        first = max(sequence.begin, 1)
        tokens, predictors = here[first:], here[first - 1 : -1]
        if sequence.mask:
            is_scored = np.array(sequence.mask[first - sequence.begin :], dtype=bool)
            tokens, predictors = tokens[is_scored], predictors[is_scored]
        is_new = edge_at[tokens] < 0
        scored.append(np.stack((predictors[is_new], tokens[is_new])))
        edge_at[tokens[is_new]] = np.arange(count, count + scored[-1].shape[1])
        count += scored[-1].shape[1]
        edges.append(edge_at[tokens])
    predictors, tokens = np.concatenate(scored, axis=1)
    sizes = list(map(len, edges))
    of_padded = np.concatenate(at if places is None else [at[i] for i in places])
    return PackedRow(
        input_ids=torch.from_numpy(tree.ids)[None],
        position_ids=torch.from_numpy(tree.positions)[None],
        segments=Segments(tree.segments),
        scored=torch.from_numpy(predictors),
        targets=torch.from_numpy(tree.ids[tokens]),
        edge_index=None if count == sum(sizes) else torch.from_numpy(np.concatenate(edges)),
        cu_seqlens=torch.tensor([0, *accumulate(sizes)]),
        # Their order is not looked at where they are as many: each then stands once.
        token_index=None if len(of_padded) == len(tree.ids) else torch.from_numpy(of_padded),
    )
