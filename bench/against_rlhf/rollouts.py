"""What PPO and RLOO share: completions drawn from the policy, what the reference and the reward say about them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from against_rlhf.ledger import sampling_flops
from against_rlhf.reward_model import RewardModel
from against_rlhf.rows import Rows, by_length, completion_logps, count_policy, count_scalars
from against_rlhf.run import Run
from torch import Tensor
from transformers import LlamaForCausalLM

from fastdpo.demo.sampling import TokenSamples, decode, sample_batches


@dataclass(frozen=True)
class Rollout:
    """B completions of the policy as it was; T is the longest of them.

    logps:     float32 [B, T], of each token when it was drawn; 0 beyond the end
    ref_logps: float32 [B, T], under the reference
    mask:      bool [B, T], True on tokens, the end token included
    scores:    float32 [B], the reward of each whole completion
    """

    rows: Rows
    logps: Tensor
    ref_logps: Tensor
    mask: Tensor
    scores: Tensor


class Rollouts:
    """Draws from a policy, with the task's prompts in random order, pass after pass.

    ``reward_model=None`` scores by the true reward. Each prompt gets ``each`` completions, which stand together.
    """

    def __init__(self, run: Run, reward_model: RewardModel | None, each: int = 1) -> None:
        if run.settings.batch_size % each:
            raise ValueError(f"batch_size is {run.settings.batch_size}; it should be a multiple of {each}")
        self._run, self._reward_model, self._each = run, reward_model, each
        self._prompts = _endlessly(run.task.prompts, random.Random(run.settings.seed))
        self._generator = torch.Generator().manual_seed(run.settings.seed)

    @torch.no_grad()
    def draw(self, policy: LlamaForCausalLM) -> Rollout:
        """``batch_size`` completions, and what is known about them before they are learned from."""
        task, ledger, config = self._run.task, self._run.ledger, policy.config
        count = self._run.settings.batch_size
        prompts = [prompt for _ in range(count // self._each) for prompt in [next(self._prompts)] * self._each]
        with ledger.part("rollout"):
            (samples,) = sample_batches(
                policy,
                task.tokenizer,
                prompts,
                max_new_tokens=task.max_new_tokens,
                generator=self._generator,
                batch_size=count,
            )
        fed = steps_fed(samples.mask.sum(dim=1))
        width = torch.full_like(fed, samples.prompt_ids.shape[1])
        ledger.count(
            "rollout",
            "policy",
            tokens=int((width + fed - 1).sum()),
            flops=sampling_flops(config, width, fed),
        )
        with ledger.part("scoring"):
            rows = Rows.of_samples(samples)
            ref_logps = by_length(lambda some: completion_logps(task.model, some), rows)
            scores = self._scores(prompts, samples, rows)
        count_policy(ledger, "scoring", "reference", config, rows, trained=False)
        return Rollout(rows, samples.logps, ref_logps, samples.mask, scores)

    def _scores(self, prompts: list[str], samples: TokenSamples, rows: Rows) -> Tensor:
        task, ledger = self._run.task, self._run.ledger
        if self._reward_model is None:
            return torch.tensor(task.reward(decode(task.tokenizer, prompts, [samples])))
        count_scalars(ledger, "scoring", "reward model", task.model.config, rows, unread=0, trained=False)
        scores = by_length(self._reward_model.of_rows, rows)
        # The reward model was shown whole texts alone: one that was cut is worth no more than the worst beside it.
        return torch.where(samples.ended, scores, scores.min())


def _endlessly(prompts: list[str], rng: random.Random) -> Iterator[str]:
    while True:
        yield from rng.sample(prompts, len(prompts))


def steps_fed(lengths: Tensor) -> Tensor:
    """For how many steps ``sample_tokens`` kept each completion in its batch, int64 [B], given their lengths.

    Those that have ended are dropped once they are half of it.
    """
    fed = torch.zeros_like(lengths)
    live = torch.arange(len(lengths))
    for step in range(int(lengths.max())):
        fed[live] += 1
        running = lengths[live] > step + 1
        if 2 * running.sum() <= len(live):
            live = live[running]
    return fed


def improve(run: Run, policy: LlamaForCausalLM, step: Callable[[], None]) -> LlamaForCausalLM:
    """Takes the run's steps, each a call of ``step``, with a look before the first and every ``look_every`` of them."""
    settings = run.settings
    if run.look(0, policy):
        return policy
    for done in range(1, settings.steps + 1):
        step()
        if done % settings.look_every == 0 and run.look(done, policy):
            break
    return policy
