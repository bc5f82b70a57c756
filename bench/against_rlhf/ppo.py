"""RLHF as it is usually done: proximal policy optimisation (PPO, Schulman et al. 2017, arXiv 1707.06347).

As by Ziegler et al. (2019, arXiv 1909.08593), Stiennon et al. (2020, arXiv 2009.01325) and Ouyang et al. (2022, arXiv
2203.02155): every token is an action, costs beta (log pi - log pi_ref), and the last one earns the completion's score.
The value model is a network of its own that starts from the reward model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from against_rlhf.optimizer import Optimizer
from against_rlhf.reward_model import ScalarModel, fit_reward_model
from against_rlhf.rollouts import Rollout, Rollouts, improve
from against_rlhf.rows import Rows, by_length, completion_logps, count_policy, count_scalars
from against_rlhf.run import Run
from torch import Tensor
from transformers import LlamaForCausalLM

LAMBDA = 0.95


@dataclass(frozen=True)
class PPOOptions:
    """What a step does with its completions.

    Attributes:
        epochs: times that each completion is learned from.
        minibatches: updates of an epoch.
        clip: most that a token's probability ratio may count to change.
        value_clip: most that a value may count to change, in units of reward.
        value_learning_rate: of the value model.
    """

    epochs: int = 1
    minibatches: int = 4
    clip: float = 0.2
    value_clip: float = 0.5
    value_learning_rate: float = 3e-4


def train_ppo(run: Run, *, reward: Literal["learned", "true"], options: PPOOptions | None = None) -> LlamaForCausalLM:
    """Trains a copy of the task's model on the true reward, or on one that is fitted to the run's pairs first."""
    options = options or PPOOptions()
    settings, ledger, config = run.settings, run.ledger, run.task.model.config
    reward_model = fit_reward_model(run) if reward == "learned" else None
    rollouts = Rollouts(run, reward_model)
    policy = copy.deepcopy(run.task.model)
    value_model = ScalarModel(policy) if reward_model is None else copy.deepcopy(reward_model)
    updates = settings.steps * options.epochs * options.minibatches if settings.decay else None
    policy_optimizer = Optimizer(policy, settings.learning_rate, updates)
    value_optimizer = Optimizer(value_model, options.value_learning_rate)
    generator = torch.Generator().manual_seed(settings.seed)

    def values_of(rows: Rows) -> Tensor:
        return rows.before(value_model(rows.ids[:, :-1])) * rows.mask()

    def step() -> None:
        rollout = rollouts.draw(policy)
        with ledger.part("value"), torch.no_grad():
            values = by_length(values_of, rollout.rows)
            advantages = estimate_advantages(token_rewards(rollout, settings.beta), values, rollout.mask)
        count_scalars(ledger, "value", "value model", config, rollout.rows, unread=1, trained=False)
        returns, advantages = advantages + values, normalised(advantages, rollout.mask)
        for batch in _minibatches(settings.batch_size, options, generator):
            rows = rollout.rows.take(batch)
            old_logps, old_values, wanted, gains, mask = (
                full[batch][:, : rows.mask().shape[1]]
                for full in (rollout.logps, values, returns, advantages, rollout.mask)
            )
            with ledger.part("update"):
                logps = by_length(lambda some: completion_logps(policy, some), rows)
                policy_optimizer.update(policy_loss(logps, old_logps, gains, mask, options.clip))
            count_policy(ledger, "update", "policy", config, rows, trained=True)
            with ledger.part("value"):
                found = by_length(values_of, rows)
                value_optimizer.update(value_loss(found, old_values, wanted, mask, options.value_clip))
            count_scalars(ledger, "value", "value model", config, rows, unread=1, trained=True)

    return improve(run, policy, step)


def _minibatches(count: int, options: PPOOptions, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(options.epochs):
        yield from torch.randperm(count, generator=generator).chunk(options.minibatches)


def token_rewards(rollout: Rollout, beta: float) -> Tensor:
    """float32 [B, T]: what each token costs in divergence from the reference, and at the last one the score."""
    rewards = -beta * (rollout.logps - rollout.ref_logps)
    rewards[torch.arange(len(rewards)), rollout.mask.sum(dim=1) - 1] += rollout.scores
    return rewards


def estimate_advantages(rewards: Tensor, values: Tensor, mask: Tensor, decay: float = LAMBDA) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv 1506.02438, equation 16) with gamma = 1: [B, T].

    The sum over k of decay^k delta_{t+k}, delta_t = rewards_t + values_{t+1} - values_t. ``rewards`` and ``values``
    are 0 beyond the end, where ``mask`` is False; there advantages are 0 as well.
    """
    advantages = torch.zeros_like(rewards)
    following, next_value = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        following = (rewards[:, t] + next_value - values[:, t] + decay * following) * mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = following
    return advantages


def normalised(advantages: Tensor, mask: Tensor) -> Tensor:
    """With mean 0 and standard deviation 1 over the tokens; 0 beyond the end."""
    here = advantages[mask]
    return (advantages - here.mean()) / (here.std() + 1e-8) * mask


def policy_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> Tensor:
    """PPO's clipped objective (equation 7), negative, as a mean over tokens."""
    ratio = (logps - old_logps).exp()
    gain = torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    return -gain[mask].mean()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Half of the mean squared error over tokens; leaving ``old_values`` further than ``clip`` gains nothing."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    error = torch.maximum((values - returns) ** 2, (near - returns) ** 2)
    return 0.5 * error[mask].mean()
