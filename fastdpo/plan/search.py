"""The largest micro-batch with which a run fits into a device's memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastdpo.model.language_model import language_model
from fastdpo.model.row_collator import RowCollator
from fastdpo.plan.batches import Row, budget_of, largest_part, make_collator, tokens_of
from fastdpo.plan.layers import Repetition, repetition_in
from fastdpo.plan.models import look_at_policy
from fastdpo.plan.setup import Setup
from fastdpo.plan.sharding import Units, as_computed, is_divided, share_of, units_of
from fastdpo.plan.step import trace_step
from fastdpo.plan.tracker import PARTS

# Budgets are told in multiples of this.
_ROUND = 64
# A guess is a straight line's; what is above it is taken back in steps.
_BACK = 0.9
# Of a run that nobody shares.
_NO_UNITS = Units(0, 0, 0, 0, 0, 0, 0, 0)


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
        is_divisible: one may be taken in parts (:attr:`fastdpo.trainer.config.DPOConfig.is_divisible`).
    """

    rows: Sequence[Row]
    layout: str
    max_tokens: int | None = None
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    multiple: int | None = None
    accumulates: bool = False
    is_divisible: bool = True

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
        # By ids, which no other setups have while these are here.
        self._computed: dict[tuple[int, bool], tuple[Setup, Setup]] = {}

    def answer(self, setup: Setup, stage: str = "ddp", devices: int = 1) -> Answer:
        """For one setup.

        Raises:
            NotImplementedError, ValueError: the model cannot be run so, or the optimiser is not known.
        """
        if devices > 1 and not is_divided(setup, stage):
            raise NotImplementedError(
                f"weights in {setup.bits} bits are not divided over devices; share the run by ddp, zero1 or zero2"
            )
        batches, memory = self._batches, self._memory
        computed = self._as_computed(setup, stage if devices > 1 else "ddp")
        units = units_of(setup, stage) if devices > 1 else _NO_UNITS

        def at(max_tokens: int | None) -> Answer:
            parts, tokens = self._trace(computed, max_tokens)
            shared = share_of(parts, stage, devices, units)
            return Answer(setup, stage, devices, len(batches.rows), max_tokens, tokens, shared, memory)

        whole, _ = largest_part(batches.collator(setup.device, batches.max_tokens), batches.rows)
        alone, _ = largest_part(batches.collator(setup.device, None), batches.rows[:1])
        size, least_size = tokens_of(whole), tokens_of(alone)
        if not batches.is_divisible or size <= least_size:
            return at(batches.max_tokens)
        least = at(least_size)
        if not least.fits:
            return self._as_counted(least)
        best = least
        # As if all of this grew with the tokens, which some of it does not; and then by what that has told.
        slope = (least.parts["activations"] + least.parts["head"]) / least.tokens
        for _ in range(2):
            budget = least.tokens + (memory - least.total) / max(slope, 1.0)
            if budget >= size and at(batches.max_tokens).fits:
                return at(batches.max_tokens)
            budget = max(min(budget, size - 1), 2 * least.tokens)
            found = at(_rounded(budget, least.tokens))
            while not found.fits and found.tokens > least.tokens:
                budget *= _BACK
                found = at(_rounded(budget, least.tokens))
            best = max(best, found, key=lambda answer: answer.tokens)
            slope = (found.total - least.total) / max(found.tokens - least.tokens, 1)
        return self._as_counted(best)

    def _as_counted(self, answer: Answer) -> Answer:
        """With the budget that was filled: rows of other lengths than these would fill a larger one with more."""
        part, _ = largest_part(self._batches.collator(answer.setup.device, answer.max_tokens), self._batches.rows)
        return replace(answer, max_tokens=budget_of(part))

    def least_shared(self, setup: Setup, stages: Sequence[str], devices: int) -> Answer:
        """For the first of the stages with which the setup fits, or else the last; less sharing sends less.

        Raises:
            NotImplementedError, ValueError: see :meth:`answer`.
        """
        possible = [stage for stage in stages if is_divided(setup, stage)] or stages[-1:]
        for stage in possible[:-1]:
            if not self._is_hopeless(setup, stage, devices):
                found = self.answer(setup, stage, devices)
                if found.fits:
                    return found
        return self.answer(setup, possible[-1], devices)

    def _is_hopeless(self, setup: Setup, stage: str, devices: int) -> bool:
        """Whether weights and the optimiser's state alone do not fit, for which no step has to be run."""
        units = units_of(setup, stage)
        fixed = dict.fromkeys(PARTS, 0) | {"weights": units.whole}
        fixed["reference"] = units.whole if setup.reference == "model" else 0
        fixed["optimizer"] = units.state if setup.dtype == torch.float32 else 0
        return sum(share_of(fixed, stage, devices, units).values()) > self._memory

    def _trace(self, setup: Setup, max_tokens: int | None) -> tuple[dict[str, int], int]:
        name = id(setup), max_tokens
        if name not in self._traced:
            part, count = largest_part(self._batches.collator(setup.device, max_tokens), self._batches.rows)
            others = count > 1 or self._batches.accumulates
            parts = trace_step(setup, part, others=others, repetition=repetition_of(setup))
            self._traced[name] = parts, tokens_of(part)
        return self._traced[name]

    def _as_computed(self, setup: Setup, stage: str) -> Setup:
        computed = as_computed(setup, stage)
        return self._computed.setdefault((id(setup), computed is setup), (setup, computed))[1]


def repetition_of(setup: Setup) -> Repetition | None:
    """How the layers of the setup's policy repeat; None where they do not."""
    every = int(setup.checkpointing_kwargs.get("every_n_layers", 1))
    return repetition_in(language_model(look_at_policy(setup)), every)


def _rounded(budget: float, least: int) -> int:
    return max(int(budget) // _ROUND * _ROUND, least)


def describe(answer: Answer) -> dict[str, Any]:
    """What JSON tells of an answer."""
    setup = answer.setup
    return {
        "method": setup.method,
        "dtype": str(setup.dtype).removeprefix("torch."),
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
