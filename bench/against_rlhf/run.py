"""What every arm is given, and what it calls back: the settings of a run and the points where it is looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from against_rlhf.ledger import Ledger
from against_rlhf.task import Task
from transformers import LlamaForCausalLM

from fastdpo.demo.preferences import Preference

# Told the optimiser or PPO steps done so far and the policy as it is; True ends the run.
Look = Callable[[int, LlamaForCausalLM], bool]


@dataclass(frozen=True)
class Settings:
    """A run's settings.

    Attributes:
        learning_rate: of the policy, at its peak.
        beta: DPO's beta; RLHF's KL coefficient. In both the optimum is proportional to pi_ref exp(r / beta), with
            rewards in log-odds of preference.
        batch_size: pairs, or sampled completions, of a step.
        steps: at most.
        look_every: steps between looks.
        seed: of everything that is random in the arm.
        decay: whether the learning rate falls to 0 over ``steps``, for what a run converges to. Otherwise it stays
            where the warm-up brought it, so that a policy on the way does not depend on when the run would end.
        reward_model_batch: pairs of an update of the reward model. Few where pairs are few, so that there are updates
            enough; more where there are plenty.
    """

    learning_rate: float
    beta: float
    batch_size: int
    steps: int
    look_every: int
    seed: int
    decay: bool = False
    reward_model_batch: int = 8


@dataclass(frozen=True)
class Run:
    """What an arm trains with.

    Attributes:
        pairs: empty for arms that learn from the true reward.
        shared: where runs with the same seed find one reward model, and what it cost; None: each fits its own.
    """

    task: Task
    pairs: list[Preference]
    settings: Settings
    ledger: Ledger
    look: Look
    shared: Path | None = None
