"""What a batch's losses are of: pairs of its sequences, or rankings of them; and which losses hang together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from fastdpo.logps.wide import widened

# What a loss may count beside 0: sums of such weights, and of losses times them, are numbers.
_LEAST_WEIGHT, _MOST_WEIGHT = 1e-37, 1e37


class Part(NamedTuple):
    """Some of a batch's losses, where the sums of their sequences alone are at hand.

    Attributes:
        units: which losses, n of them.
        members: [n, K] int64, where the sums of their sequences stand among those at hand; None for n pairs whose
            chosen sequences come first, in order, and then the rejected ones.
    """

    units: slice | Tensor
    members: Tensor | None


@dataclass(frozen=True)
class Units:
    """U losses over S sequences.

    Attributes:
        count: U.
        sequences: S.
        members: [U, K] int64, the sequences that each loss is of: chosen and rejected, or a ranking's, the best first,
            filled up with -1. None for pairs of which one half of the sequences is chosen, the other rejected.
        weights: [U] float64, what each loss counts in their mean; None where all count the same.
        listed: the members on the host; None where it may not look at them.
    """

    count: int
    sequences: int
    members: Tensor | None = None
    weights: Tensor | None = None
    listed: Sequence[Sequence[int]] | None = None

    def mean(self, losses: Tensor) -> Tensor:
        """The loss: the mean of all losses [U], each counted by its weight."""
        if self.weights is None:
            return losses.mean()
        return (losses * self.weights).sum() / self.weights.sum()

    def share(self, losses: Tensor, part: Part) -> Tensor:
        """What the losses of a part come to in the mean of all."""
        if self.weights is None:
            return losses.sum() / self.count
        return (losses * self.weights[part.units]).sum() / self.weights.sum()

    def components(self) -> Components:
        """What can be computed apart: sequences that losses link stand in one component, with these losses."""
        if self.members is None:
            return Components([[i, self.count + i] for i in range(self.count)], [[i] for i in range(self.count)])
        assert self.listed is not None
        return _components(self.listed, self.sequences)


class Components(NamedTuple):
    """Parts of a batch that no loss links to each other, in the order of their first losses."""

    sequences: list[list[int]]
    units: list[list[int]]


def _components(members: Sequence[Sequence[int]], sequences: int) -> Components:
    parent = list(range(sequences))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for first, *others in members:
        for other in others:
            parent[root(other)] = root(first)
    # A component is named by its root; sequences that no loss is of come last, each a component without a loss.
    units: dict[int, list[int]] = {}
    for unit, (first, *_) in enumerate(members):
        units.setdefault(root(first), []).append(unit)
    inside: dict[int, list[int]] = {name: [] for name in units}
    for i in range(sequences):
        inside.setdefault(root(i), []).append(i)
    return Components(list(inside.values()), [units.get(name, []) for name in inside])


def halves(sequences: int) -> Units:
    """The pairs of an even number of sequences, the chosen ones first."""
    return Units(sequences // 2, sequences)


def units_of(
    pairs: Tensor | None,
    rankings: Tensor | None,
    weights: Tensor | None,
    *,
    sequences: int,
    device: torch.device,
    look: bool,
) -> Units:
    """From :func:`dpo_loss`'s arguments of these names.

    Args:
        sequences: how many there are.
        device: where they are.
        look: whether the host may look at the tensors' values.

    Raises:
        TypeError, ValueError, IndexError: naming the argument, what it was and what it should be.
    """
    if pairs is None and rankings is None:
        units = halves(sequences)
    else:
        name, members = ("pairs", pairs) if rankings is None else ("rankings", rankings)
        assert members is not None
        _check_members(name, members, sequences, device)
        listed = None
        if look:
            listed = [[i for i in unit if i >= 0 or name == "pairs"] for unit in members.tolist()]
            (_check_pairs if name == "pairs" else _check_rankings)(listed, members.tolist(), sequences)
        units = Units(len(members), sequences, members.to(torch.int64), None, listed)
    if weights is None:
        return units
    _check_weights(weights, units.count, "rankings" if rankings is not None else "pairs", device, look=look)
    return Units(units.count, sequences, units.members, widened(weights.detach()), units.listed)


def _check_members(name: str, members: Tensor, sequences: int, device: torch.device) -> None:
    wanted = "[P, 2], the sequence chosen and the one rejected" if name == "pairs" else "[R, K], K at least 2"
    if members.dim() != 2 or (members.shape[1] != 2 if name == "pairs" else members.shape[1] < 2):
        raise ValueError(f"{name} has shape {tuple(members.shape)}; it should be {wanted}")
    if members.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} has dtype {members.dtype}; it should be torch.int64 or torch.int32")
    if members.device != device:
        raise ValueError(f"{name} is on {members.device}, targets on {device}; they should be on one device")
    if len(members) == 0:
        raise ValueError(f"{name} has shape {tuple(members.shape)}: there is no loss of no {name}; give at least one")


def _check_pairs(pairs: Sequence[Sequence[int]], _: Sequence[Sequence[int]], sequences: int) -> None:
    for p, (chosen, rejected) in enumerate(pairs):
        for i in (chosen, rejected):
            if not 0 <= i < sequences:
                raise IndexError(f"pairs[{p}] names sequence {i}; there are {sequences}, numbered from 0")
        if chosen == rejected:
            raise ValueError(f"pairs[{p}] names sequence {chosen} as chosen and as rejected; they should be two")


def _check_rankings(rankings: Sequence[Sequence[int]], given: Sequence[Sequence[int]], sequences: int) -> None:
    for r, (ranking, whole) in enumerate(zip(rankings, given, strict=True)):
        for i in whole:
            if not -1 <= i < sequences:
                raise IndexError(
                    f"rankings[{r}] names sequence {i}; there are {sequences}, numbered from 0, and -1 fills up"
                )
        if -1 in whole[: len(ranking)]:
            raise ValueError(f"rankings[{r}] is {list(whole)}; -1 should stand behind its sequences alone")
        if len(ranking) < 2:
            raise ValueError(f"rankings[{r}] has {len(ranking)} sequences; it should have at least 2")
        if len(set(ranking)) < len(ranking):
            raise ValueError(f"rankings[{r}] is {list(ranking)}; it should name each sequence once")


def check_numbers(
    numbers: Tensor, name: str, count: int, device: torch.device, *, look: bool, of: str = "pairs"
) -> None:
    """Raises unless there is one for each of ``count`` losses, and, where the host may look, each is finite."""
    if numbers.shape != (count,):
        raise ValueError(f"{name} has shape {tuple(numbers.shape)}; it should be ({count},), one for each of the {of}")
    if not numbers.is_floating_point():
        raise TypeError(f"{name} has dtype {numbers.dtype}; it should be a floating dtype")
    if numbers.device != device:
        raise ValueError(f"{name} is on {numbers.device}, targets on {device}; they should be on one device")
    if look and not bool(numbers.isfinite().all()):
        raise ValueError(f"{name} is {numbers.tolist()}; all should be finite")


def _check_weights(weights: Tensor, count: int, of: str, device: torch.device, *, look: bool) -> None:
    check_numbers(weights, "weights", count, device, look=False, of=of)
    if not look:
        return
    values = weights.tolist()
    for i, weight in enumerate(values):
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weights[{i}] is {weight}; it should be at least 0 and finite")
        if weight and not _LEAST_WEIGHT <= weight <= _MOST_WEIGHT:
            raise ValueError(f"weights[{i}] is {weight}; it should be 0, or from {_LEAST_WEIGHT:g} to {_MOST_WEIGHT:g}")
    if not any(values):
        raise ValueError("weights are all 0: there is nothing to take the mean of; at least one should be above 0")


def runs(indices: Sequence[int]) -> list[slice]:
    """Rising indices as slices of neighbours."""
    found: list[slice] = []
    for i in indices:
        if found and found[-1].stop == i:
            found[-1] = slice(found[-1].start, i + 1)
        else:
            found.append(slice(i, i + 1))
    return found


def merged(lists: Sequence[list[int]]) -> list[int]:
    """All their numbers, rising."""
    return sorted(chain.from_iterable(lists))
