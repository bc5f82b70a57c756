"""The largest micro-batch with which a run fits into a device's memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastdpo.model.language_model import language_model
from fastdpo.model.row_collator import RowCollator
from fastdpo.plan.batches import Row, largest_part, make_collator, tokens_of
from fastdpo.plan.layers import Repetition, repetition_in
from fastdpo.plan.models import make_policy
from fastdpo.plan.setup import Setup
from fastdpo.plan.sharding import share_of, units_of
from fastdpo.plan.step import trace_step
from fastdpo.plan.tracker import PARTS

# Budgets are told in multiples of this.
_ROUND = 64
# The first guess is a straight line's; what is above it is taken back in steps.
_TRIES, _BACK = 4, 0.9


@dataclass(frozen=True)
class Batches:
    """What the batches of a run are made of.

    Attributes:
        rows: those that need most memory, the longest first: a batch of them.
        layout: how they are laid out.
        max_tokens: of a micro-batch, where the run says so.
        max_length: of a sequence.
        truncation_mode: how a longer one is cut.
        multiple: what a padded batch's width is a multiple of.
        accumulates: a step has several of them, so that there are gradients already while one runs.
    """

    rows: Sequence[Row]
    layout: str
    max_tokens: int | None = None
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    multiple: int | None = None
    accumulates: bool = False

    def collator(self, device: str, max_tokens: int | None) -> RowCollator:
        return make_collator(
            self.layout,
            device,
            max_tokens=max_tokens,
            max_length=self.max_length,
            truncation_mode=self.truncation_mode,
            multiple=self.multiple,
        )


@dataclass(frozen=True)
class Answer:
    """What a setup needs, with the largest micro-batch that fits, or the smallest where none does.

    Attributes:
        setup: the run.
        stage, devices: over which devices, and how.
        pairs: rows of a device's batch.
        max_tokens: of a micro-batch; None where a batch is one.
        tokens: of the largest micro-batch, padding included.
        parts: part of memory -> bytes at the peak.
        memory: what there is.
    """

    setup: Setup
    stage: str
    devices: int
    pairs: int
    max_tokens: int | None
    tokens: int
    parts: dict[str, int]
    memory: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.total <= self.memory


class Planner:
    """Finds what fits.

    Args:
        batches: of the run.
        memory: bytes of a device that may be used.
    """

    def __init__(self, batches: Batches, memory: int) -> None:
        self._batches, self._memory = batches, memory
        self._traced: dict[tuple[int, int | None], tuple[dict[str, int], int]] = {}
        self._repetitions: dict[int, Repetition | None] = {}
        self._setups: list[Setup] = []  # kept, so that no other has its id

    def answer(self, setup: Setup, stage: str = "ddp", devices: int = 1) -> Answer:
        """For one setup.

        Raises:
            NotImplementedError, ValueError: the model cannot be run so, or the optimiser is not known.
        """
        self._setups.append(setup)
        units = units_of(setup)

        def at(max_tokens: int | None) -> Answer:
            parts, tokens = self._trace(setup, max_tokens)
            shared = share_of(parts, stage, devices, units)
            return Answer(setup, stage, devices, pairs, max_tokens, tokens, shared, self._memory)

        pairs = len(self._batches.rows)
        fixed = {"weights": units.whole, "reference": units.whole if setup.reference == "model" else 0}
        fixed = share_of(dict.fromkeys(PARTS, 0) | fixed, stage, devices, units)
        is_hopeless = sum(fixed.values()) > self._memory
        alone, _ = largest_part(self._batches.collator(setup.device, None), self._batches.rows[:1])
        if is_hopeless:
            return at(tokens_of(alone))
        whole = at(self._batches.max_tokens)
        if whole.fits or whole.tokens <= tokens_of(alone):
            return whole
        least = at(tokens_of(alone))
        if not least.fits:
            return least
        slope = (whole.total - least.total) / (whole.tokens - least.tokens)
        budget = float(least.tokens + (self._memory - least.total) / max(slope, 1.0))
        for _ in range(_TRIES):
            rounded = int(budget) // _ROUND * _ROUND
            if rounded <= least.tokens:
                break
            found = at(rounded)
            if found.fits:
                return found
            budget *= _BACK
        return least

    def _trace(self, setup: Setup, max_tokens: int | None) -> tuple[dict[str, int], int]:
        name = id(setup), max_tokens
        if name not in self._traced:
            collator = self._batches.collator(setup.device, max_tokens)
            part, count = largest_part(collator, self._batches.rows)
            others = count > 1 or self._batches.accumulates
            parts = trace_step(setup, part, others=others, repetition=self._repetition(setup))
            self._traced[name] = parts, tokens_of(part)
        return self._traced[name]

    def _repetition(self, setup: Setup) -> Repetition | None:
        if id(setup) not in self._repetitions:
            every = int(setup.checkpointing_kwargs.get("every_n_layers", 1))
            self._repetitions[id(setup)] = repetition_in(language_model(make_policy(setup)), every)
        return self._repetitions[id(setup)]


def describe(answer: Answer) -> dict[str, Any]:
    """What JSON tells of an answer."""
    setup = answer.setup
    return {
        "method": setup.method,
        "gradient_checkpointing": setup.checkpointing,
        "activation_offloading": setup.offloading,
        "reference": setup.reference,
        "optim": setup.optim,
        "stage": answer.stage if answer.devices > 1 else None,
        "devices": answer.devices,
        "per_device_train_batch_size": answer.pairs,
        "max_tokens_per_batch": answer.max_tokens,
        "tokens": answer.tokens,
        "parts": answer.parts,
        "total": answer.total,
        "memory": answer.memory,
        "fits": answer.fits,
        "measured": False,
    }
