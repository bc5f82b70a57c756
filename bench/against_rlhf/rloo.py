"""RLHF without a value model: REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv 2402.14740)."""

from __future__ import annotations

import copy
from typing import Literal

import torch
from against_rlhf.optimizer import Optimizer
from against_rlhf.reward_model import fit_reward_model
from against_rlhf.rollouts import Rollout, Rollouts, improve
from against_rlhf.rows import by_length, completion_logps, count_policy
from against_rlhf.run import Run
from torch import Tensor
from transformers import LlamaForCausalLM

EACH = 4  # completions of a prompt
_CLIP = 0.2


def train_rloo(run: Run, *, reward: Literal["learned", "true"], minibatches: int = 4) -> LlamaForCausalLM:
    """Trains a copy of the task's model on the true reward, or on one that is fitted to the run's pairs first.

    The loss is that of TRL's RLOO trainer, with the ratio of whole completions clipped. With one update a step the
    ratio is 1, and that is plain REINFORCE.
    """
    settings, ledger = run.settings, run.ledger
    rollouts = Rollouts(run, fit_reward_model(run) if reward == "learned" else None, each=EACH)
    policy = copy.deepcopy(run.task.model)
    updates = settings.steps * minibatches if settings.decay else None
    optimizer = Optimizer(policy, settings.learning_rate, updates)
    generator = torch.Generator().manual_seed(settings.seed)

    def step() -> None:
        rollout = rollouts.draw(policy)
        advantages = leave_one_out(sequence_rewards(rollout, settings.beta), EACH)
        old_logps = rollout.logps.sum(dim=1)
        for batch in torch.randperm(settings.batch_size, generator=generator).chunk(minibatches):
            rows = rollout.rows.take(batch)
            with ledger.part("update"):
                logps = by_length(lambda some: completion_logps(policy, some), rows).sum(dim=1)
                optimizer.update(sequence_loss(logps, old_logps[batch], advantages[batch], _CLIP))
            count_policy(ledger, "update", "policy", policy.config, rows, trained=True)

    return improve(run, policy, step)


def sequence_rewards(rollout: Rollout, beta: float) -> Tensor:
    """float32 [B]: each completion's score, less beta times its log-ratio to the reference."""
    return rollout.scores - beta * (rollout.logps - rollout.ref_logps).sum(dim=1)


def leave_one_out(rewards: Tensor, each: int) -> Tensor:
    """Each reward less the mean of the others of its prompt; [B], the ``each`` of a prompt side by side."""
    groups = rewards.view(-1, each)
    return (groups - (groups.sum(dim=1, keepdim=True) - groups) / (each - 1)).view(-1)


def sequence_loss(logps: Tensor, old_logps: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """The clipped objective with completions for actions, negative, as a mean over them; all are [B]."""
    ratio = (logps - old_logps).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages).mean()
