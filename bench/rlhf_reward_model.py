"""The reward model of RLHF: the task's model with a scalar head, fitted to the labelled pairs."""

from __future__ import annotations

import copy
import random

import torch
from rlhf_optimizer import Optimizer
from rlhf_rows import Rows, by_length, count_scalars
from rlhf_run import Run
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from fastdpo.demo.language_model import encode_completions
from fastdpo.demo.sampling import TokenSamples

_LEARNING_RATE = 1e-3
_PASSES = 1
_PAIRS = 8  # of an update: many small ones; after 50 of 32 pairs the model had learned next to nothing
_CENTRING = 128  # pairs


class ScalarModel(nn.Module):
    """A number for every token: a copy of a language model's body with a head of one output, which starts at zero."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.body = copy.deepcopy(model.model)
        self.head = nn.Linear(model.config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: Tensor) -> Tensor:
        """float32 [B, L] for ids, int64 [B, L], padded on the right."""
        return self.head(self.body(ids, use_cache=False).last_hidden_state)[..., 0].float()


class RewardModel(ScalarModel):
    """A completion's reward, in log-odds of preference, is the number at its last token."""

    def of_rows(self, rows: Rows) -> Tensor:
        """float32 [B]."""
        return self(rows.ids).gather(1, rows.lengths[:, None] - 1)[:, 0]

    @torch.no_grad()
    def score(self, samples: TokenSamples) -> Tensor:
        """The reward of each sample, float32 [B]."""
        return by_length(self.of_rows, Rows.of_samples(samples))


def fit_reward_model(run: Run) -> RewardModel:
    """Fits -log sigmoid(r(chosen) - r(rejected)) over the run's pairs; each is seen ``_PASSES`` times.

    Rewards are then centred, as by Stiennon et al. (2020, arXiv 2009.01325, section 3.4): the mean over the texts of
    ``_CENTRING`` pairs is taken off.
    """
    model = RewardModel(run.task.model)
    with run.ledger.part("reward model"):
        pairs = _encoded(run)
        rng = random.Random(run.settings.seed)
        order = [i for _ in range(_PASSES) for i in rng.sample(range(len(pairs)), len(pairs))]
        batches = [order[start : start + _PAIRS] for start in range(0, len(order), _PAIRS)]
        optimizer = Optimizer(model, _LEARNING_RATE, updates=len(batches))
        for batch in batches:
            rows = _rows([pairs[i] for i in batch])
            optimizer.update(pair_loss(by_length(model.of_rows, rows)))
            _count(run, rows, trained=True)
        with torch.no_grad():
            rows = _rows(pairs[:_CENTRING])
            model.head.bias -= by_length(model.of_rows, rows).mean()
            _count(run, rows, trained=False)
    return model


def pair_loss(rewards: Tensor) -> Tensor:
    """Bradley and Terry's, a scalar, of [2 n] rewards: those of the chosen texts, then those of the rejected ones."""
    chosen, rejected = rewards.chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


_Text = tuple[list[int], list[int]]  # prompt and completion


def _encoded(run: Run) -> list[tuple[_Text, _Text]]:
    """Each pair's chosen and rejected text."""
    prompts = [pair.prompt for pair in run.pairs]
    chosen = encode_completions(run.task.tokenizer, prompts, [pair.chosen for pair in run.pairs])
    rejected = encode_completions(run.task.tokenizer, prompts, [pair.rejected for pair in run.pairs])
    return list(zip(chosen, rejected, strict=True))


def _rows(pairs: list[tuple[_Text, _Text]]) -> Rows:
    return Rows.of_ids([chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs])


def _count(run: Run, rows: Rows, *, trained: bool) -> None:
    config = run.task.model.config
    count_scalars(run.ledger, "reward model", "reward model", config, rows, unread=0, trained=trained)
