"""The exact tier: reward, divergence and the whole frontier between them, summed over every sequence there is.

Where completions are short and the vocabulary small, nothing has to be estimated. What an arm has reached can then be
compared with the best that any policy can reach within the same divergence,

    pi(y | x)  proportional to  pi_ref(y | x) exp(r(x, y) / beta)

(Rafailov et al. 2023, https://arxiv.org/abs/2305.18290, equation 4), of one beta for all prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from against_rlhf.ledger import Ledger
from against_rlhf.run import Run, Settings
from against_rlhf.task import Task
from torch import Tensor
from transformers import LlamaForCausalLM

from fastdpo.demo.preferences import Preference
from fastdpo.demo.sampling import Completion

# Between these, beta goes from picking the best sequences to changing nothing.
_BETAS = (1e-3, 1e9)
_HALVINGS = 60


@dataclass(frozen=True)
class Point:
    """Mean reward over prompts, and KL(pi || pi_ref) of whole sequences in nats."""

    reward: float
    kl: float


@dataclass(frozen=True)
class Reached:
    """Where a policy was after ``steps``; ``gap``: see :meth:`ExactTier.gap`."""

    steps: int
    point: Point
    gap: float


class ExactTier:
    """All completions of a task's held-out prompts: every sequence of vocabulary entries that a sampler can draw,
    up to the end token, or cut at the limit.

    Args:
        task: its prompts have equally many tokens; V ** max_new_tokens is small.

    Attributes:
        tokens: [S, max_new_tokens] int64, the completions, padded on the right.
        ended: [S] bool, whether the end token was reached.
        rewards: [P, S] float64, of each prompt's completions.
        ref_logps: [P, S] float64, under the reference.

    Raises:
        ValueError: the prompts are of different lengths.
    """

    def __init__(self, task: Task) -> None:
        tokenizer, self._limit = task.tokenizer, task.max_new_tokens
        self.task = task
        prompts = tokenizer(task.held_out)["input_ids"]
        if len(set(map(len, prompts))) > 1:
            raise ValueError(f"prompts have {sorted(set(map(len, prompts)))} tokens; they should be equally long")
        end = tokenizer.eos_token_id
        inner = torch.tensor([token for token in range(len(tokenizer)) if token != end])
        # Every beginning but for the last token; what is shorter begins one of them.
        self._beginnings = torch.cartesian_prod(*[inner] * (self._limit - 1)).view(-1, self._limit - 1)
        self._prompts = torch.tensor(prompts)

        # Sequence s is the first lengths[s] tokens of beginnings[rows[s]], and then last[s].
        rows, lengths, last = [], [], []
        for length in range(self._limit):
            distinct = torch.arange(0, len(self._beginnings), len(inner) ** (self._limit - 1 - length))
            closing = torch.tensor([end]) if length < self._limit - 1 else torch.tensor([end, *inner])
            rows.append(distinct.repeat_interleave(len(closing)))
            lengths.append(torch.full_like(rows[-1], length))
            last.append(closing.repeat(len(distinct)))
        self._rows, self._lengths, self._last = map(torch.cat, (rows, lengths, last))

        self.ended = self._last == end
        places = torch.arange(self._limit)
        self.tokens = torch.nn.functional.pad(self._beginnings[self._rows], (0, 1))
        self.tokens[places >= self._lengths[:, None]] = tokenizer.pad_token_id
        self.tokens[places == self._lengths[:, None]] = self._last
        texts = tokenizer.batch_decode(self.tokens, skip_special_tokens=True)
        outcomes = list(zip(texts, self.ended.tolist(), strict=True))
        self.rewards = torch.tensor(
            [task.reward([Completion(prompt, *outcome) for outcome in outcomes]) for prompt in task.held_out],
            dtype=torch.float64,
        )
        self.ref_logps = self.logps(task.model)

    @torch.no_grad()
    def logps(self, policy: LlamaForCausalLM) -> Tensor:
        """Log-probability of every sequence, float64 [P, S]; each prompt's probabilities add up to 1."""
        prompts, beginnings = len(self._prompts), len(self._beginnings)
        ids = torch.cat(
            [self._prompts.repeat_interleave(beginnings, dim=0), self._beginnings.repeat(prompts, 1)], dim=1
        )
        logits = policy(ids.to(policy.device), use_cache=False, logits_to_keep=self._limit).logits
        steps = logits.double().log_softmax(dim=-1).cpu().view(prompts, beginnings, self._limit, -1)
        drawn = steps[:, :, :-1].gather(3, self._beginnings.expand(prompts, -1, -1).unsqueeze(3)).squeeze(3)
        so_far = torch.nn.functional.pad(drawn.cumsum(dim=2), (1, 0))
        return so_far[:, self._rows, self._lengths] + steps[:, self._rows, self._lengths, self._last]

    def measure(self, policy: LlamaForCausalLM) -> Point:
        """The policy's exact reward and divergence."""
        return self._point(self.logps(policy))

    def optimum(self, beta: float) -> Point:
        """Of the best policy for reward - beta * KL."""
        return self._point((self.ref_logps + self.rewards / beta).log_softmax(dim=1))

    def frontier(self, betas: Iterable[float]) -> list[Point]:
        """The optimum for each beta."""
        return [self.optimum(beta) for beta in betas]

    @cached_property
    def start(self) -> Point:
        """The reference's own."""
        return self._point(self.ref_logps)

    @cached_property
    def best(self) -> Point:
        """The end of the frontier: nothing but the sequences of the highest reward, as likely as they were."""
        highest = self.rewards == self.rewards.amax(dim=1, keepdim=True)
        return self._point(self.ref_logps.masked_fill(~highest, -torch.inf).log_softmax(dim=1))

    def reward_at(self, kl: float) -> float:
        """The highest reward within a divergence of ``kl``; nats, at least 0."""
        if kl >= self.best.kl:
            return self.best.reward
        low, high = map(math.log, _BETAS)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.optimum(math.exp(middle)).kl > kl else (low, middle)
        return self.optimum(math.exp((low + high) / 2)).reward

    def gap(self, point: Point) -> float:
        """How far below the frontier, as a share of the rewards between the reference and the best sequences."""
        return (self.reward_at(point.kl) - point.reward) / (self.best.reward - self.start.reward)

    def _point(self, logps: Tensor) -> Point:
        chances = logps.exp()
        divergence = torch.where(chances > 0, chances * (logps - self.ref_logps), 0.0)
        return Point((chances * self.rewards).sum(dim=1).mean().item(), divergence.sum(dim=1).mean().item())


def approach(
    tier: ExactTier,
    train: Callable[[Run], object],
    settings: Settings,
    pairs: Sequence[Preference] = (),
) -> list[Reached]:
    """Where an arm's policy is at each look, the first before any step. ``pairs`` for the arms that learn from them."""
    found: list[Reached] = []

    def look(steps: int, policy: LlamaForCausalLM) -> bool:
        point = tier.measure(policy)
        found.append(Reached(steps, point, tier.gap(point)))
        return False

    train(Run(tier.task, list(pairs), settings, Ledger(), look))
    return found
