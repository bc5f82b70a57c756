"""What all arms start from: a language model, prompts, the known reward, and pairs that were labelled by it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from fastdpo.demo.preferences import Preference, prefers_first
from fastdpo.demo.sampling import Completion, TokenSamples, decode, sample_batches

_POOL = 4  # batches

RewardFunction = Callable[[Sequence[Completion]], list[float]]


@dataclass(frozen=True)
class Task:
    """A reward to be raised, and how far a model may go for it.

    Attributes:
        name: for tables.
        model: the start of every arm's policy, and its reference; no arm changes it.
        tokenizer: pads on the left; its eos_token ends a completion.
        prompts: what arms sample completions of, as often as they want.
        held_out: what policies are evaluated on; no arm sees them.
        reward: the true reward of each completion, in log-odds of preference.
        max_new_tokens: most tokens of a completion, the end token included.
    """

    name: str
    model: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerFast
    prompts: list[str]
    held_out: list[str]
    reward: RewardFunction
    max_new_tokens: int


def sample_from(
    task: Task, model: LlamaForCausalLM, prompts: Sequence[str], generator: torch.Generator, batch_size: int = 256
) -> tuple[list[Completion], list[TokenSamples]]:
    """One completion of each prompt at temperature 1, as texts and, batch by batch, as tokens."""
    batches = sample_batches(
        model,
        task.tokenizer,
        prompts,
        max_new_tokens=task.max_new_tokens,
        generator=generator,
        batch_size=batch_size,
    )
    return decode(task.tokenizer, prompts, batches), batches


def sample_pairs(task: Task, count: int, seed: int) -> list[Preference]:
    """``count`` pairs of completions of the task's model, each labelled once by Bradley and Terry's model.

    A pair of equal texts, or with a text that was cut, is drawn again: the trainers close every completion with the
    end token, and would teach an end that the model never wrote.
    """
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    pairs: list[Preference] = []
    while len(pairs) < count:
        prompts = [rng.choice(task.prompts) for _ in range(min(1024, count))]
        first, _ = sample_from(task, task.model, prompts, generator)
        second, _ = sample_from(task, task.model, prompts, generator)
        rewards = zip(task.reward(first), task.reward(second), strict=True)
        for a, b, (a_reward, b_reward) in zip(first, second, rewards, strict=True):
            if a.ended and b.ended and a.text != b.text:
                pairs.append(_labelled(a, b, a_reward, b_reward, rng))
    return pairs[:count]


def _labelled(a: Completion, b: Completion, a_reward: float, b_reward: float, rng: random.Random) -> Preference:
    if prefers_first(a_reward, b_reward, rng):
        return Preference(a.prompt, a.text, b.text, a_reward, b_reward)
    return Preference(a.prompt, b.text, a.text, b_reward, a_reward)


def batches_of_pairs(pairs: Sequence[Preference], size: int, rng: random.Random) -> list[list[Preference]]:
    """``pairs`` in batches of ``size``, the last one maybe less; every few batches were sorted by length among
    themselves: that saves padding, and an optimiser's momentum still sees all lengths."""
    taken: list[list[Preference]] = []
    for start in range(0, len(pairs), _POOL * size):
        pool = sorted(pairs[start : start + _POOL * size], key=lambda pair: max(len(pair.chosen), len(pair.rejected)))
        batches = [pool[place : place + size] for place in range(0, len(pool), size)]
        taken += rng.sample(batches, len(batches))
    return taken
