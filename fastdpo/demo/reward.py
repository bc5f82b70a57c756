"""The known reward: how favourable a text is, as long as it is still a text.

It stands in for the judgement of a person, and is measured in the unit in which such judgements are modelled:
of two texts whose rewards differ by d, the better one is preferred with probability 1 / (1 + exp(-d)).
It is defined for every string and looks at words and surface only; it knows nothing of the grammar that
writes the corpus, which is kept as an independent check.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from fastdpo.demo.corpus import corpus_words
from fastdpo.demo.vocabulary import OPINION_WEIGHTS

# Reward of one point of mean opinion. It sets how sure the simulated person is.
SENTIMENT_SCALE = 6.0
# Two imagined neutral opinions beside those that were voiced: one kind word alone is no rave review.
_NEUTRAL_OPINIONS = 2.0
# "not good" is bad, but less so than "good" is good.
_NEGATION = -0.6
# How far a negator reaches, in words: "not a very good" still holds together.
_REACH = 3
_NEGATORS = frozenset(("not", "never", "no", "cannot", "hardly", "without", "far", "nothing", "n't"))
_DEGREES = {
    "truly": 1.3,
    "really": 1.25,
    "very": 1.25,
    "surprisingly": 1.1,
    "quite": 0.9,
    "rather": 0.8,
    "slightly": 0.5,
}
# A clause ends a negator's reach.
_CLAUSE_END = frozenset((",", ".", ";", ":", "!", "?", "and", "but", "although"))

_CAPITALISED = frozenset(("I", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"))

# What a text loses. The first three are per share of the text, so that length does not matter.
_UNKNOWN_COST = 12.0
_REPETITION_COST = 8.0
_BAD_SENTENCE_COST = 4.0
_CROWDING_COST = 10.0
_CROWDING_FREE = 0.35
_NO_END_COST = 2.0
_BRIEF_COST = 0.25
_BRIEF_WORDS = 8
LOWEST_REWARD = -8.0

_TOKEN = re.compile(r"n't\b|[A-Za-z]+(?=n't)|[A-Za-z]+(?:'[a-z]+)?|[^\sA-Za-z]")


@dataclass(frozen=True)
class RewardParts:
    """The terms of a reward; ``faults`` is what is taken off, and never negative."""

    sentiment: float
    faults: float

    @property
    def total(self) -> float:
        """The reward, at least ``LOWEST_REWARD``."""
        return max(self.sentiment - self.faults, LOWEST_REWARD)


def _tokens(text: str) -> list[str]:
    return _TOKEN.findall(text)


def _sentiment(tokens: list[str]) -> float:
    """Mean opinion, times the scale. A word that comes again counts half as much each time."""
    total, voiced = 0.0, 0
    times: Counter[str] = Counter()
    for place, token in enumerate(tokens):
        weight = OPINION_WEIGHTS.get(token)
        if weight is None:
            continue
        factor = 1.0
        for distance in range(1, _REACH + 1):
            before = tokens[place - distance] if distance <= place else "."
            if before in _CLAUSE_END:
                break
            if distance == 1:
                factor *= _DEGREES.get(before, 1.0)
            if before in _NEGATORS:
                factor *= _NEGATION
        total += weight * factor * 0.5 ** times[token]
        times[token] += 1
        voiced += 1
    return SENTIMENT_SCALE * total / (voiced + _NEUTRAL_OPINIONS)


def _sentence_is_bad(sentence: str) -> bool:
    words = re.findall(r"[A-Za-z']+", sentence)
    lower = [word.lower() for word in words]
    pairs = list(zip(lower, lower[1:], strict=False))
    return (
        not 2 <= len(words) <= 30
        or not sentence[0].isupper()
        or any(word[0].isupper() and word not in _CAPITALISED for word in words[1:])
        or any(first == second for first, second in pairs)
        or any(first in ("a", "an") and (first == "an") != (second[0] in "aeiou") for first, second in pairs)
        or re.search(r"\s{2}|\s[,.]|,,|[^\w\s,.!?']", sentence) is not None
    )


def _faults(text: str, tokens: list[str]) -> float:
    words = [token.lower() for token in tokens if token[0].isalpha()]
    known = corpus_words() | OPINION_WEIGHTS.keys() | _NEGATORS | _DEGREES.keys()
    unknown = sum(token not in known for token in words) / len(words)
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    repeated = 1 - len(set(trigrams)) / len(trigrams) if trigrams else 0.0
    crowding = sum(word in OPINION_WEIGHTS for word in words) / len(words)
    sentences = re.split(r"(?<=[.!?])\s", text.strip())
    bad_sentences = sum(_sentence_is_bad(sentence) for sentence in sentences) / len(sentences)
    return (
        _UNKNOWN_COST * unknown
        + _REPETITION_COST * repeated
        + _CROWDING_COST * max(0.0, crowding - _CROWDING_FREE)
        + _BAD_SENTENCE_COST * bad_sentences
        + _NO_END_COST * (not re.search(r"[.!?]$", text.rstrip()))
        + _BRIEF_COST * max(0, _BRIEF_WORDS - len(words))
    )


def reward_parts(text: str) -> RewardParts:
    """The reward's terms for a completion (without its prompt)."""
    tokens = _tokens(text)
    if not any(token[0].isalpha() for token in tokens):
        return RewardParts(0.0, -LOWEST_REWARD)
    return RewardParts(_sentiment([token.lower() for token in tokens]), _faults(text, tokens))


def true_reward(text: str) -> float:
    """The known reward of a completion, in log-odds of preference; the corpus has mean about 0."""
    return reward_parts(text).total
