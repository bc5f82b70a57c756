"""The reward model of RLHF: the task's model with a scalar head, fitted to the labelled pairs."""

from __future__ import annotations

import copy
import os
import random
from collections.abc import Sequence

import torch
from against_rlhf.optimizer import Optimizer
from against_rlhf.rows import Rows, by_length, count_scalars
from against_rlhf.run import Run
from against_rlhf.task import batches_of_pairs
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from fastdpo.demo.language_model import encode_completions
from fastdpo.demo.preferences import Preference
from fastdpo.demo.sampling import TokenSamples

_LEARNING_RATE = 1e-3
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
    """A completion's reward, in log-odds of preference, is the mean of its tokens' numbers.

    The number at the last token alone is more usual and does worse here: on unseen pairs, after 3,200 others, it is
    right about the labels in 63 % of cases, and the mean in 68 %.
    """

    def of_rows(self, rows: Rows) -> Tensor:
        """float32 [B]."""
        numbers, place = self(rows.ids), torch.arange(rows.ids.shape[1], device=rows.ids.device)
        inside = (place >= rows.prompts[:, None]) & (place < rows.lengths[:, None])
        return (numbers * inside).sum(dim=1) / inside.sum(dim=1)

    @torch.no_grad()
    def score(self, samples: TokenSamples) -> Tensor:
        """The reward of each sample, float32 [B]."""
        return by_length(self.of_rows, Rows.of_samples(samples))


def fit_reward_model(run: Run) -> RewardModel:
    """The reward model of a run's pairs. Where runs share it, the first one fits it, and every one owes its cost."""
    model = RewardModel(run.task.model)
    kept = None if run.shared is None else run.shared / f"reward-model-{run.settings.seed}.pt"
    if kept is not None and kept.exists():
        weights, cost = torch.load(kept)
        model.load_state_dict(weights)
        run.ledger.owe("reward model", cost)
        return model
    _fit(model, run)
    if kept is not None:
        unfinished = kept.with_suffix(f".{os.getpid()}")
        torch.save((model.state_dict(), run.ledger.snapshot()["reward model"]), unfinished)
        unfinished.rename(kept)
    return model


def _fit(model: RewardModel, run: Run) -> None:
    """Fits -log sigmoid(r(chosen) - r(rejected)) over the run's pairs; each is seen once.

    Rewards are then centred, as by Stiennon et al. (2020, arXiv 2009.01325, section 3.4): the mean over the texts of
    ``_CENTRING`` pairs is taken off.
    """
    with run.ledger.part("reward model"):
        rng = random.Random(run.settings.seed)
        pairs = rng.sample(run.pairs, len(run.pairs))
        batches = [_rows(run, batch) for batch in batches_of_pairs(pairs, run.settings.reward_model_batch, rng)]
        optimizer = Optimizer(model, _LEARNING_RATE, updates=len(batches))
        for rows in batches:
            optimizer.update(pair_loss(by_length(model.of_rows, rows)))
            _count(run, rows, trained=True)
        with torch.no_grad():
            rows = _rows(run, pairs[:_CENTRING])
            model.head.bias -= by_length(model.of_rows, rows).mean()
            _count(run, rows, trained=False)


def pair_loss(rewards: Tensor) -> Tensor:
    """Bradley and Terry's, a scalar, of [2 n] rewards: those of the chosen texts, then those of the rejected ones."""
    chosen, rejected = rewards.chunk(2)
    return -F.logsigmoid(chosen - rejected).mean()


def _rows(run: Run, pairs: Sequence[Preference]) -> Rows:
    """The chosen texts, then the rejected ones."""
    prompts = [pair.prompt for pair in pairs] * 2
    texts = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    return Rows.of_ids(encode_completions(run.task.tokenizer, prompts, texts))


def _count(run: Run, rows: Rows, *, trained: bool) -> None:
    config = run.task.model.config
    count_scalars(run.ledger, "reward model", "reward model", config, rows, unread=0, trained=trained)
