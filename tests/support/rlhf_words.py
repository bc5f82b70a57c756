"""A language of six words, a model that hardly prefers any, and a reward for one: what RLHF can learn in seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from against_rlhf.ledger import Ledger
from against_rlhf.reward_model import RewardModel
from against_rlhf.run import Run, Settings
from against_rlhf.task import Task, sample_from, sample_pairs
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from fastdpo.demo.language_model import build_model
from fastdpo.demo.sampling import Completion, TokenSamples

WORDS = ("<|pad|>", "<|end|>", "a", "b", "c", "d", "e", "f")


def share_of_a(completions: list[Completion]) -> list[float]:
    """Up to 8, for nothing but "a"."""
    words = [completion.text.split() for completion in completions]
    return [8 * row.count("a") / max(1, len(row)) for row in words]


def word_task() -> Task:
    """Texts of words, and a model of them nearly without an opinion, small enough to be made on the spot."""
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token=WORDS[0], eos_token=WORDS[1], padding_side="left"
    )
    prompts = [f"{first} {second}{third}" for first in "abcdef" for second in "abc" for third in ("", " d", " e f")]
    model = build_model(tokenizer, hidden_size=64, layers=2, seed=0, max_positions=32).eval()
    with torch.no_grad():
        model.model.norm.weight.mul_(0.25)
    return Task("a", model, tokenizer, prompts, prompts[::5], share_of_a, max_new_tokens=10)


def make_run(task: Task, pairs: int = 0, look: Callable[..., bool] | None = None, **settings: Any) -> Run:
    defaults = {"learning_rate": 1e-3, "beta": 0.1, "batch_size": 64, "steps": 3, "look_every": 1, "seed": 0}
    return Run(
        task,
        sample_pairs(task, pairs, seed=0) if pairs else [],
        Settings(**(defaults | settings)),
        Ledger(),
        look or (lambda step, policy: False),
    )


def draw(task: Task, count: int = 70, seed: int = 0) -> tuple[list[Completion], TokenSamples]:
    """Completions of the task's model, as texts and as tokens."""
    prompts = [task.prompts[i % len(task.prompts)] for i in range(count)]
    completions, (samples,) = sample_from(task, task.model, prompts, torch.Generator().manual_seed(seed))
    return completions, samples


def a_reward_model(task: Task) -> RewardModel:
    """One that was fitted to nothing."""
    model = RewardModel(task.model)
    nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    return model
