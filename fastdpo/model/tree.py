"""Token sequences → a tree in which what they begin with in common stands once, and a row that holds it.

The tree is made of branches. The longest of the sequences that have a beginning in common lies in the row as it is,
with all its tokens; the others hang on it where they part, and have the rest of their tokens alone. So most of a row is
plain sequences, and what hangs is short. A sequence that others begin with is a part of one of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from fastdpo.model.segments import Range, Segment

# The fewest tokens that are worth a branch's attention of its own: its keys are gathered in every layer.
LEAST_SHARED = 8
# What a score that is computed and masked out costs, times the model's width, in tokens through the model: on a CPU,
# whose attention computes all scores of a branch where it has a mask, and half of them where a sequence is plain.
# Measured with 8 heads of 64 on one Zen 4 core, float32 and bfloat16, forward and backward: 0.05 microseconds a score,
# where a token of a layer of that width, 512, takes 360. Scores cost as the width, tokens as its square.
MASKED_ON_CPU = 0.07


class Branch(NamedTuple):
    """The part of the tree that is one sequence's own.

    Attributes:
        sequence: whose tokens.
        parent: the sequence whose branch this one hangs on; None at a root.
        depth: how many of the sequence's tokens stand before, in other branches.
    """

    sequence: int
    parent: int | None
    depth: int


@dataclass(frozen=True)
class Tree:
    """Sequences laid out as a row of N tokens.

    Attributes:
        ids, positions: [N] int64, tokens, and how many come before each on its way from the root.
        segments: of the row: the branches.
        paths: of each sequence, where in the row its tokens are.
    """

    ids: np.ndarray
    positions: np.ndarray
    segments: list[Segment]
    paths: list[tuple[Range, ...]]


class Prefixes:
    """What the sequences of a batch begin with in common.

    Args:
        sequences: [n] int64 each, n at least 1.
        least: the fewest tokens for which a branch is made. Sequences of which one is the other's beginning have it
            in common at any length.
        masked: what a score costs that is computed and masked out, in tokens through the model. A branch is only made
            where that is less than the tokens that it saves.
    """

    def __init__(self, sequences: Sequence[np.ndarray], least: int = LEAST_SHARED, masked: float = 0.0) -> None:
        self._sequences, self._least, self._masked = sequences, least, masked
        self._lengths = [len(ids) for ids in sequences]
        # Any order serves in which sequences that begin alike are neighbours; bytes are compared fastest.
        as_bytes = [ids.tobytes() for ids in sequences]
        self._order = sorted(range(len(sequences)), key=as_bytes.__getitem__)
        self._common = [_common(sequences[a], sequences[b]) for a, b in pairwise(self._order)]

    def families(self) -> list[int]:
        """A number for each sequence; those with different numbers share nothing."""
        found = [0] * len(self._order)
        family = 0
        for before, sequence in enumerate(self._order[1:]):
            family += self._common[before] < self._least
            found[sequence] = family
        return found

    def tokens(self, members: Sequence[int]) -> int:
        """How many tokens a row of these sequences has."""
        branches, _ = self._branches(members)
        return sum(self._lengths[b.sequence] - b.depth for b in branches)

    def tree(self) -> Tree:
        """The tree of all sequences."""
        branches, hosts = self._branches(range(len(self._sequences)))
        order = _depth_first(branches, hosts)
        ids, positions, segments, begin = [], [], [], 0
        at: dict[int, tuple[Segment, int]] = {}
        for branch in order:
            ancestors: tuple[Range, ...] = ()
            if branch.parent is not None:
                parent, start = at[branch.parent]
                ancestors = (*parent.ancestors, (parent.begin, parent.begin + branch.depth - start))
            own = self._sequences[branch.sequence][branch.depth :]
            segment = Segment(begin, begin + len(own), ancestors)
            at[branch.sequence] = segment, branch.depth
            begin = segment.end
            ids.append(own)
            positions.append(np.arange(branch.depth, branch.depth + len(own)))
            segments.append(segment)
        paths = []
        for i, length in enumerate(self._lengths):
            segment, _ = at[hosts.get(i, i)]
            paths.append(_first(length, (*segment.ancestors, (segment.begin, segment.end))))
        return Tree(np.concatenate(ids), np.concatenate(positions), segments, paths)

    def _branches(self, members: Sequence[int]) -> tuple[list[Branch], dict[int, int]]:
        """The branches, parents first; and of each sequence without one, whose beginning it is."""
        order, common = self._among(members)
        groups = _groups(common)
        leaders = [0] * len(groups)
        for i in reversed(range(len(groups))):
            leaders[i] = min(
                (leaders[part] for part in groups[i].parts),
                key=lambda s: (-self._lengths[s], s),
                default=order[groups[i].begin],
            )
        branches = {leaders[0]: Branch(leaders[0], None, 0)}
        hosts: dict[int, int] = {}
        shared = [0] * len(groups)
        for i, (group, leader) in enumerate(zip(groups, leaders, strict=True)):
            others = [leaders[part] for part in group.parts if leaders[part] != leader]
            hosts.update((s, leader) for s in others if self._lengths[s] == group.common)
            others = [s for s in others if s not in hosts]
            depth = self._hanging_at(shared[i], group.common, others)
            for part in group.parts:
                shared[part] = depth
            # The leader may itself begin at this depth, or beyond: the token before is then another's.
            parent: int | None = leader if depth and others else None
            while parent is not None and branches[parent].depth >= depth:
                parent = branches[parent].parent
            branches.update((s, Branch(s, parent, depth)) for s in others)
        return list(branches.values()), hosts

    def _hanging_at(self, above: int, common: int, sequences: Sequence[int]) -> int:
        """How much sequences share with the one that lies: what all have in common, or what others share already."""
        saved = common - above
        if not sequences or saved < self._least:
            return above
        # A branch of n tokens has n²/2 scores that are masked out; one that lies as it is has none.
        masked = sum(
            (self._lengths[s] - common) ** 2 - (self._lengths[s] - above) ** 2 * (above > 0) for s in sequences
        )
        return common if saved * len(sequences) > self._masked * masked / 2 else above

    def _among(self, members: Sequence[int]) -> tuple[list[int], list[int]]:
        """These sequences in order, and what each has in common with the next of them."""
        if len(members) == len(self._order):
            return self._order, self._common
        wanted = set(members)
        places = [place for place, s in enumerate(self._order) if s in wanted]
        return [self._order[place] for place in places], [min(self._common[a:b]) for a, b in pairwise(places)]


class _Group(NamedTuple):
    """Neighbours in order that have a beginning in common.

    Attributes:
        begin: the first one's place.
        common: how many tokens all of them have in common.
        parts: the groups of those that have more in common, as places in the list of groups; none for one sequence.
    """

    begin: int
    common: int
    parts: range


def _groups(common: Sequence[int]) -> list[_Group]:
    """All groups, larger ones before their parts; the first is of all."""
    bounds = [(0, len(common) + 1)]
    groups: list[_Group] = []
    for begin, end in bounds:  # which grows
        if end - begin == 1:
            groups.append(_Group(begin, 0, range(0)))
            continue
        length = min(common[begin : end - 1])
        cuts = [begin, *(i + 1 for i in range(begin, end - 1) if common[i] == length), end]
        groups.append(_Group(begin, length, range(len(bounds), len(bounds) + len(cuts) - 1)))
        bounds += pairwise(cuts)
    return groups


def _depth_first(branches: Sequence[Branch], hosts: dict[int, int]) -> list[Branch]:
    """In the order of a row: what hangs on a token before anything that does not; else as the sequences come."""
    first = {branch.sequence: branch.sequence for branch in branches}
    for sequence, host in hosts.items():
        first[host] = min(first[host], sequence)
    hanging: dict[int | None, list[Branch]] = {}
    for branch in reversed(branches):
        hanging.setdefault(branch.parent, []).append(branch)
        if branch.parent is not None:
            first[branch.parent] = min(first[branch.parent], first[branch.sequence])
    order: list[Branch] = []
    for found in hanging.values():
        found.sort(key=lambda b: (b.depth, -first[b.sequence]))
    stack = hanging[None]
    while stack:
        order.append(stack.pop())
        stack += hanging.get(order[-1].sequence, [])
    return order


def side_by_side(sequences: Sequence[np.ndarray]) -> Tree:
    """Each sequence in full, one after another."""
    begin, segments = 0, []
    for ids in sequences:
        segments.append(Segment(begin, begin + len(ids)))
        begin += len(ids)
    return Tree(
        ids=np.concatenate(sequences),
        positions=np.concatenate([np.arange(len(ids)) for ids in sequences]),
        segments=segments,
        paths=[((s.begin, s.end),) for s in segments],
    )


def in_a_row(trees: Sequence[Tree]) -> Tree:
    """Trees one after another."""
    segments: list[Segment] = []
    paths: list[tuple[Range, ...]] = []
    for tree in trees:
        by = segments[-1].end if segments else 0
        segments += [Segment(s.begin + by, s.end + by, _moved(s.ancestors, by)) for s in tree.segments]
        paths += [_moved(path, by) for path in tree.paths]
    return Tree(
        np.concatenate([tree.ids for tree in trees]),
        np.concatenate([tree.positions for tree in trees]),
        segments,
        paths,
    )


def _moved(ranges: Sequence[Range], by: int) -> tuple[Range, ...]:
    return tuple((begin + by, end + by) for begin, end in ranges)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """How many tokens two sequences begin with in common."""
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    first = int(differ.argmax()) if length else 0
    return first if length and differ[first] else length


def _first(length: int, path: Sequence[Range]) -> tuple[Range, ...]:
    """The beginning of a path, of so many tokens."""
    ranges: list[Range] = []
    for begin, end in path:
        if length > 0:
            ranges.append((begin, min(end, begin + length)))
            length -= end - begin
    return tuple(ranges)
