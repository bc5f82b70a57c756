"""How dpo_loss takes a batch: in which groups of components, and how much of each it keeps. From sizes alone.

A component is a pair, or as many pairs (or rankings) as share sequences.

One product is tokens x H x V. Where the output embedding trains, a token costs three: its logits, hidden's gradient,
and the weight's. The last needs c = dL/dlogp, hence its pairs' losses; until that is there, the token's V exponentials
are kept, or its logits are multiplied again, a fourth product. A group's losses are known from its own tokens, so one
group after another can keep its exponentials in the same memory.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

# A group streams the weight, and the float32 sum of its gradient in and out, some 12 bytes an entry for 6 flops a
# token: at 512 tokens some 250 flops a byte, which is what an H100 does (800 TFLOP/s over 3 TB/s). Smaller groups would
# wait for memory. A CPU does some 10 flops a byte.
MIN_GROUP_TOKENS = 512

# With a frozen output embedding groups only bound how much of hidden's gradient stands in float32 at a time. This many
# tokens is what the CUDA forward takes at once in any case.
FROZEN_GROUP_TOKENS = 2048

# Components [first, last) of each group; together all, in order.
Groups = tuple[tuple[int, int], ...]


class Plan(NamedTuple):
    """How a batch is taken.

    Attributes:
        groups: which components come together.
        kept: scored tokens of a group whose exponentials are kept, at most.
        recomputed: scored tokens of all groups together whose exponentials are not: these cost a fourth product.
    """

    groups: Groups
    kept: int
    recomputed: int


def plan_groups(tokens: Sequence[int], *, workspace: int, row_bytes: int, sum_bytes: int) -> Plan:
    """The fewest products within the workspace, then the fewest groups; for an output embedding that trains.

    Args:
        tokens: scored tokens of each component, at least one.
        workspace: bytes; what is kept and, with several groups, the sum together never take up more.
        row_bytes: what one token's exponentials take up.
        sum_bytes: what several groups need for the sum of the weight's gradients, beyond the gradient itself.
    """
    total = sum(tokens)
    kept = min(total, workspace // row_bytes)
    whole = Plan(((0, len(tokens)),), kept, total - kept)
    kept = max(workspace - sum_bytes, 0) // row_bytes
    if whole.recomputed == 0 or kept == 0:
        return whole
    groups = _filled(tokens, kept)
    if len(groups) > total // MIN_GROUP_TOKENS:
        groups = _at_least(tokens, MIN_GROUP_TOKENS)
    else:
        groups = _evenly_filled(tokens, kept, len(groups))
    recomputed = sum(max(sum(tokens[first:last]) - kept, 0) for first, last in groups)
    return Plan(groups, kept, recomputed) if recomputed < whole.recomputed else whole


def plan_frozen_groups(tokens: Sequence[int]) -> Plan:
    """For an output embedding that does not train, of which nothing is kept or computed twice."""
    return Plan(_at_least(tokens, FROZEN_GROUP_TOKENS), 0, 0)


def _filled(tokens: Sequence[int], capacity: int) -> Groups:
    """The fewest groups of at most ``capacity`` tokens; a component of more is a group of its own."""
    bounds, size = [0], 0
    for component, count in enumerate(tokens):
        if size and size + count > capacity:
            bounds.append(component)
            size = 0
        size += count
    return tuple(pairwise([*bounds, len(tokens)]))


def _evenly_filled(tokens: Sequence[int], capacity: int, groups: int) -> Groups:
    """As many groups as ``capacity`` needs, filled to the least capacity for which they suffice."""
    least = bisect_left(range(capacity), True, key=lambda tried: len(_filled(tokens, tried)) <= groups)
    return _filled(tokens, least)


def _at_least(tokens: Sequence[int], size: int) -> Groups:
    """The most groups of at least ``size`` tokens; one of all if there are fewer."""
    bounds, reached = [0], 0
    for component, count in enumerate(tokens):
        reached += count
        if reached >= size:
            bounds.append(component + 1)
            reached = 0
    # What is left after the last full group belongs to it.
    return tuple(pairwise([*(bounds[:-1] or bounds), len(tokens)]))
