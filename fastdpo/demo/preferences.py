"""Preference pairs: two texts of the model for one prompt, and the choice that a simulated person makes."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from fastdpo.demo.reward import true_reward
from fastdpo.demo.sampling import Completion


@dataclass(frozen=True)
class Preference:
    """One labelled pair, with the true rewards (log-odds of preference) that the label was drawn from."""

    prompt: str
    chosen: str
    rejected: str
    chosen_reward: float
    rejected_reward: float

    @property
    def is_right(self) -> bool:
        """Whether the label agrees with the true order."""
        return self.chosen_reward >= self.rejected_reward


def prefers_first(first_reward: float, second_reward: float, rng: random.Random) -> bool:
    """Draw a choice by Bradley and Terry's model: the first wins with probability sigmoid(first - second)."""
    return rng.random() < 1 / (1 + math.exp(second_reward - first_reward))


def _comparable(first: Sequence[Completion], second: Sequence[Completion]) -> list[tuple[Completion, Completion]]:
    """The pairs that can be compared: different texts, and both came to their end.

    A trainer closes every completion with the end token, and would teach an end that the model never wrote.
    """
    return [(a, b) for a, b in zip(first, second, strict=True) if a.text != b.text and a.ended and b.ended]


def label_pairs(
    first: Sequence[Completion], second: Sequence[Completion], rng: random.Random | None
) -> list[Preference]:
    """Label pairs of completions; ``rng=None`` labels by the true order, without chance, and leaves out ties."""
    preferences = []
    for a, b in _comparable(first, second):
        rewards = true_reward(a.text), true_reward(b.text)
        if rng is None and rewards[0] == rewards[1]:
            continue
        first_wins = rewards[0] > rewards[1] if rng is None else prefers_first(*rewards, rng)
        if first_wins:
            preferences.append(Preference(a.prompt, a.text, b.text, *rewards))
        else:
            preferences.append(Preference(a.prompt, b.text, a.text, *reversed(rewards)))
    return preferences
