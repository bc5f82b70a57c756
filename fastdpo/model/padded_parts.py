"""The sequences of a padded batch in parts of about one length each, so that little of what is computed is padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# What a forward costs beside its tokens, in tokens: reading the weights, and starting the kernels. A processor computes
# some 50 times while it reads one weight, an accelerator some 300 times; a forward of fewer tokens takes as long.
FORWARD_COST = {"cpu": 64}
ACCELERATOR_FORWARD_COST = 256


def split_by_length(lengths: Sequence[int], cost: int) -> list[list[int]]:
    """Sequences in parts, each padded to its longest, such that all parts together take the least time.

    The time of a part is estimated as its tokens, padding included, and ``cost``. Of sequences in the order of their
    lengths, the best parts are runs; the best runs up to each sequence are found from those up to shorter ones.

    Args:
        lengths: tokens of each sequence.
        cost: of a part, in tokens.

    Returns:
        Indices of ``lengths``, each once, the longest sequences first.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    least: list[float] = [0.0]
    begins: list[int] = []
    for end in range(1, len(order) + 1):
        times = [least[begin] + cost + (end - begin) * lengths[order[begin]] for begin in range(end)]
        best = min(range(end), key=times.__getitem__)
        least.append(times[best])
        begins.append(best)
    parts: list[list[int]] = []
    end = len(order)
    while end:
        parts.append(order[begins[end - 1] : end])
        end = begins[end - 1]
    return parts[::-1]


def forwards_of(attention_mask: Tensor, cost: int, multiple: int) -> list[tuple[Tensor, int]] | None:
    """The forwards that a padded batch is taken in; None where one takes the least time.

    Args:
        attention_mask: [R, T] int64, 0 on padding, which stands on the right.
        cost: of a forward, in tokens.
        multiple: what the width of a forward is rounded up to.

    Returns:
        Which rows, [r] int64, and how many columns of these.
    """
    lengths = [length + -length % multiple for length in attention_mask.sum(1).tolist()]
    parts = split_by_length(lengths, cost)
    if len(parts) == 1:
        return None
    return [(torch.tensor(part), lengths[part[0]]) for part in parts]


def joined(pieces: Sequence[Tensor], forwards: Sequence[tuple[Tensor, int]], width: int) -> Tensor:
    """[R, width] of the forwards' [r, columns - 1], 0 where they have none; differentiable."""
    rows = torch.cat([rows for rows, _ in forwards]).to(pieces[0].device)
    padded = [torch.nn.functional.pad(piece, (0, width - piece.shape[1])) for piece in pieces]
    return torch.cat(padded)[rows.argsort()]
