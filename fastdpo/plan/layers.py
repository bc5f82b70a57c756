"""Layers that repeat: few of them are run, and what many would hold is told from that."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdpo.plan.tracker import PARTS, Event, MemoryTracker

# Where a run is: what was begun last, of which layer, and for how many times.
_Place = tuple[str, int, int]


@dataclass(frozen=True)
class Repetition:
    """Of ``count`` layers, those from ``first`` on are of the same kind as the ones ``period`` further.

    What a run holds at a place so many layers after the first, or before the last, is a straight line over the number
    of layers; and in between it is one over the place, whose ends are most. So runs of two sizes tell of all others.
    Layers next to what is not repeated may be unlike others, and therefore two periods are told from each side.
    """

    count: int
    first: int
    period: int

    @property
    def sizes(self) -> tuple[int, int]:
        """How many layers are run, twice; both end with the layer that all of them end with."""
        small = self.first + (self.count - self.first) % self.period + 4 * self.period
        return small, small + self.period

    @property
    def saves(self) -> bool:
        """Whether these are fewer than all."""
        return sum(self.sizes) < self.count

    def peak(self, small: MemoryTracker, large: MemoryTracker) -> dict[str, int] | None:
        """Part -> bytes at the peak of all layers; None where the two runs do not go alike."""
        places, others = _by_place(small), _by_place(large)
        middle = self.first + 2 * self.period
        best = dict.fromkeys(PARTS, 0)
        periods = (self.count - self.sizes[0]) // self.period
        for place, events in places.items():
            kind, layer, time = place
            same = others.get(place if layer < middle else (kind, layer + self.period, time), [])
            if len(same) != len(events):
                return None
            for few, more in zip(events, same, strict=True):
                held = {part: a + periods * (b - a) for part, a, b in zip(PARTS, few, more, strict=True)}
                best = max(best, held, key=lambda parts: sum(parts.values()))
        return best


def stack_of(lm: PreTrainedModel) -> nn.ModuleList | None:
    """The model's layers: of the lists of modules that are in no other, the one with most parameters."""

    def lists_in(module: nn.Module) -> Iterator[nn.ModuleList]:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                yield child
            else:
                yield from lists_in(child)

    return max(lists_in(lm), key=lambda found: sum(p.numel() for p in found.parameters()), default=None)


def repetition_in(lm: PreTrainedModel, every: int = 1) -> Repetition | None:
    """How the model's layers repeat, ``every`` so many of which are checkpointed as one; None where they do not."""
    layers = stack_of(lm)
    if layers is None:
        return None
    kinds = _kinds(layers, lm)
    for period in range(1, len(kinds) // 4 + 1):
        unlike = [i for i in range(len(kinds) - period) if kinds[i] != kinds[i + period]]
        found = Repetition(len(kinds), unlike[-1] + 1 if unlike else 0, math.lcm(period, every))
        if found.saves:
            return found
    return None


def _kinds(layers: nn.ModuleList, lm: PreTrainedModel) -> list[Any]:
    """Something for each layer, which is equal where layers hold and do the same."""
    plain = [_plain_values(layer) for layer in layers]
    # A layer's own number is no difference between them.
    numbers = {name for name, value in plain[0].items() if type(value) is int}
    numbers = {name for name in numbers if all(found.get(name) == i for i, found in enumerate(plain))}
    lists = [value for value in lm.config.get_text_config().to_dict().values() if isinstance(value, list)]
    lists = [values for values in lists if len(values) == len(layers)]
    return [
        (
            {name: value for name, value in found.items() if name not in numbers},
            [(name, type(module)) for name, module in layer.named_modules()],
            [(name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters()],
            [values[i] for values in lists],
        )
        for i, (layer, found) in enumerate(zip(layers, plain, strict=True))
    ]


def _plain_values(layer: nn.Module) -> dict[tuple[str, str], Any]:
    return {
        (where, name): value
        for where, module in layer.named_modules()
        for name, value in vars(module).items()
        if value is None or isinstance(value, (bool, int, float, str, tuple))
    }


def mark_layers(lm: PreTrainedModel, tracker: MemoryTracker, name: str) -> None:
    """From now on the tracker is told of each layer of the model of this name that begins, or whose backward ends."""

    def marking(layer: int) -> Callable[..., None]:
        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tracker.mark((f"{name} forward", layer))
            hidden = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if hidden is not None and hidden.requires_grad:
                hidden.register_hook(lambda grad: tracker.mark((f"{name} backward", layer)))

        return begin

    for i, layer in enumerate(stack_of(lm) or ()):
        layer.register_forward_pre_hook(marking(i), with_kwargs=True)


def _by_place(tracker: MemoryTracker) -> dict[_Place, list[Event]]:
    marks = [(("start", 0), 0), *tracker.marks]
    ends = [begin for _, begin in marks[1:]] + [len(tracker.events)]
    times: Counter[tuple[str, int]] = Counter()
    found: dict[_Place, list[Event]] = {}
    for (mark, begin), end in zip(marks, ends, strict=True):
        kind, layer = mark
        found[kind, layer, times[mark]] = tracker.events[begin:end]
        times[mark] += 1
    return found
