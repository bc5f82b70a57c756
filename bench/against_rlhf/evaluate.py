"""Where a policy stands on the held-out prompts, and when that is enough."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from against_rlhf.ledger import Ledger
from against_rlhf.task import Task, sample_from
from transformers import LlamaForCausalLM

from fastdpo.demo.measures import Mean
from fastdpo.demo.sampling import TokenSamples, sequence_kl


@dataclass(frozen=True)
class Target:
    """True reward of at least ``reward`` at no more than ``kl`` nats, KL(policy || start) of a whole completion."""

    reward: float
    kl: float

    def is_met(self, look: dict[str, Any]) -> bool:
        return look["reward"] >= self.reward and look["kl"] <= self.kl

    def __str__(self) -> str:
        return f"reward {self.reward:g} within {self.kl:g} nats"


# The start has reward -0.26, with a standard deviation of 2.13 over its texts: a half, three quarters and one of these
# above it. Fixed before any arm ran, from what `fastdpo demo` had reached: 1.5 at 2.6 nats and 1.9 at 3.9.
TARGETS = (Target(0.8, 2.0), Target(1.35, 4.0), Target(1.85, 6.0))

_LOST = 2.0
_TOGETHER = 32


def evaluate(task: Task, policy: LlamaForCausalLM, seed: int) -> dict[str, float]:
    """Mean true reward and KL on the held-out prompts, one completion each, with their standard errors."""
    generator = torch.Generator().manual_seed(seed)
    completions, batches = sample_from(task, policy, task.held_out, generator)
    reward = Mean.of(task.reward(completions))
    parts = [part for batch in batches for part in _by_length(batch)]
    kl = Mean.of(torch.cat([sequence_kl(policy, task.model, part) for part in parts]).tolist())
    return {"reward": reward.value, "reward_error": reward.error, "kl": kl.value, "kl_error": kl.error}


def _by_length(samples: TokenSamples) -> Iterator[TokenSamples]:
    """The samples in parts of similar length, without the padding of longer ones."""
    lengths = samples.mask.sum(dim=1)
    for part in lengths.argsort(stable=True).split(_TOGETHER):
        longest = int(lengths[part].max())
        prompts = int(samples.prompt_mask[part].sum(dim=1).max())
        yield TokenSamples(
            samples.prompt_ids[part, -prompts:],
            samples.prompt_mask[part, -prompts:],
            samples.tokens[part, :longest],
            samples.mask[part, :longest],
            samples.logps[part, :longest],
            samples.ended[part],
        )


def reached(looks: Sequence[dict[str, Any]], target: Target) -> int | None:
    """The first of two looks in a row that both meet the target: one alone may be luck. None if there are none."""
    met = [target.is_met(look) for look in looks]
    return next((i for i in range(len(met) - 1) if met[i] and met[i + 1]), None)


class Watcher:
    """A run's looks: evaluates, notes what was spent, and ends the run when nothing is left to be found out.

    Args:
        task, ledger, seed: the run's.
        targets: what is to be met.
        pairs_of_step: the share of the run's pairs that a step trains on.
    """

    def __init__(
        self, task: Task, ledger: Ledger, targets: Sequence[Target], seed: int, pairs_of_step: float = math.inf
    ) -> None:
        self.looks: list[dict[str, Any]] = []
        self._task, self._ledger, self._targets, self._seed = task, ledger, targets, seed
        self._pairs_of_step = pairs_of_step

    def __call__(self, step: int, policy: LlamaForCausalLM) -> bool:
        spent = self._ledger.snapshot()
        # All pairs were taken through the reference before the first step; a run that ends here needed so many of them.
        used = min(1.0, step * self._pairs_of_step) if step else 0.0
        passed = spent["reference"]
        passed |= {unit: used * passed[unit] for unit in ("seconds", "flops")}
        passed["tokens"] = {model: round(used * tokens) for model, tokens in passed["tokens"].items()}
        was_training = policy.training
        policy.eval()
        # Another seed each time: the same luck shall not count twice.
        found = evaluate(self._task, policy, seed=1_000_003 * self._seed + step)
        policy.train(was_training)
        self.looks.append({"step": step, **found, "spent": spent})
        unmet = [target for target in self._targets if reached(self.looks, target) is None]
        # A policy that is twice as far away as it may be hardly comes back; one look alone may be luck.
        return all(min(look["kl"] for look in self.looks[-2:]) > _LOST * target.kl for target in unmet)
