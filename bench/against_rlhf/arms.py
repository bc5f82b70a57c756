"""The arms, and the settings that each may choose from: as many for every arm."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from against_rlhf.run import Run, Settings
from transformers import LlamaForCausalLM


def _ppo(run: Run) -> LlamaForCausalLM:
    from against_rlhf.ppo import train_ppo

    return train_ppo(run, reward="learned")


def _ppo_true(run: Run) -> LlamaForCausalLM:
    from against_rlhf.ppo import train_ppo

    return train_ppo(run, reward="true")


def _rloo(run: Run) -> LlamaForCausalLM:
    from against_rlhf.rloo import train_rloo

    return train_rloo(run, reward="learned")


def _dpo_eager(run: Run) -> LlamaForCausalLM:
    from against_rlhf.dpo import train_dpo_eager

    return train_dpo_eager(run)


def _dpo_trl(run: Run) -> LlamaForCausalLM:
    from against_rlhf.dpo import train_dpo_trl

    return train_dpo_trl(run)


def _dpo_fastdpo(run: Run) -> LlamaForCausalLM:
    from against_rlhf.dpo import train_dpo_fastdpo

    return train_dpo_fastdpo(run)


# Of the exact tier: far enough from the start to matter, near enough for every arm to come to.
EXACT_BETA = 2.0
EXACT_PAIRS = 76_800
# With the text tier's 8 pairs an update, the best policy for the fitted reward is 2.5 % below the frontier; with 32 or
# 64, 1.7 %; with 128 updates become too few. There, 3,200 pairs in updates of 32 teach the model next to nothing.
EXACT_REWARD_MODEL_BATCH = 32


@dataclass(frozen=True)
class Arm:
    """A way to train, and with which settings.

    Attributes:
        about: for the reader of a table.
        train: returns the policy.
        has_pairs: whether it learns from labelled pairs, and so owes their price.
        rates, betas: what is tried in the text tier.
        batch_size, steps, look_every: see ``Settings``.
        exact_rate, exact_batch_size, exact_steps: the exact tier's.
    """

    about: str
    train: Callable[[Run], LlamaForCausalLM]
    has_pairs: bool
    rates: tuple[float, ...]
    betas: tuple[float, ...]
    batch_size: int
    steps: int
    look_every: int
    exact_rate: float
    exact_batch_size: int
    exact_steps: int

    def settings(self, seed: int) -> list[Settings]:
        """Every combination of learning rate and beta; the first is what is taken where nothing is tried."""
        return [self._with(rate, beta, seed) for rate, beta in itertools.product(self.rates, self.betas)]

    def exact(self, quick: bool) -> tuple[Settings, int]:
        """What the arm converges with in the exact tier, and from how many pairs."""
        part = 8 if quick else 1
        steps = self.exact_steps // part
        settings = Settings(
            self.exact_rate,
            EXACT_BETA,
            self.exact_batch_size,
            steps,
            steps // 20,
            seed=0,
            decay=True,
            reward_model_batch=EXACT_REWARD_MODEL_BATCH,
        )
        return settings, EXACT_PAIRS // part

    def _with(self, rate: float, beta: float, seed: int) -> Settings:
        return Settings(rate, beta, self.batch_size, self.steps, self.look_every, seed)


def _rl(about: str, train: Callable[[Run], LlamaForCausalLM], **options: Any) -> Arm:
    # A step samples 128 completions, as many as a DPO step of 32 pairs trains on twice over.
    return Arm(
        about,
        train,
        rates=(1e-3, 3e-4),
        betas=(0.1, 0.3),
        batch_size=128,
        steps=24,
        look_every=1,
        exact_rate=1e-3,
        exact_batch_size=256,
        exact_steps=400,
        **options,
    )


def _dpo(about: str, train: Callable[[Run], LlamaForCausalLM]) -> Arm:
    return Arm(
        about,
        train,
        has_pairs=True,
        rates=(5e-4, 2e-4),
        betas=(0.1, 0.3),
        batch_size=32,
        steps=150,
        look_every=5,
        exact_rate=1e-3,
        exact_batch_size=128,
        exact_steps=600,
    )


ARMS: dict[str, Arm] = {
    "ppo": _rl("RLHF: a reward model fitted to the pairs, then PPO", _ppo, has_pairs=True),
    "ppo-true": _rl("PPO with the true reward: no reward model, no pairs", _ppo_true, has_pairs=False),
    "rloo": _rl("a reward model fitted to the pairs, then RLOO", _rloo, has_pairs=True),
    "dpo-eager": _dpo("DPO in a plain loop, with full logits", _dpo_eager),
    "dpo-trl": _dpo("DPO by TRL's trainer", _dpo_trl),
    "dpo-fastdpo": _dpo("DPO by fastdpo's trainer", _dpo_fastdpo),
}
