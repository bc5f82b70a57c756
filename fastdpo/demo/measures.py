"""What is measured on a set of sampled texts: the true reward, and signs of fluency that it knows nothing of."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from fastdpo.demo.corpus import is_grammatical
from fastdpo.demo.language_model import perplexity
from fastdpo.demo.reward import true_reward
from fastdpo.demo.sampling import Completion


@dataclass(frozen=True)
class Mean:
    """A mean over samples, their standard deviation, and the standard error of the mean."""

    value: float
    deviation: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Of at least two values."""
        deviation = statistics.stdev(values)
        return cls(statistics.fmean(values), deviation, deviation / math.sqrt(len(values)))

    def __str__(self) -> str:
        return f"{self.value:.2f} ± {self.error:.2f}"


@dataclass(frozen=True)
class Fluency:
    """Signs of language, none of which the reward is made of.

    grammatical:   share of texts that are well-formed answers to their prompts, by the corpus' grammar
    sensible:      share of texts that the corpus' generator could have written: adjectives suit their nouns as well
    ended:         share of texts that came to an end within the length limit
    distinct_1/2:  different words (pairs of words) over all words (pairs), over the whole set of texts
    distinct_texts: share of texts that occur once only, apart from their prompt
    words:         mean number of words
    perplexity:    per token, under the base model
    """

    grammatical: float
    sensible: float
    ended: float
    distinct_1: float
    distinct_2: float
    distinct_texts: float
    words: float
    perplexity: float


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Different n-grams of words over all of them; 0 if there is none.

    It falls as texts are added: only sets of equal size can be compared.
    """
    grams = []
    for text in texts:
        words = text.lower().split()
        grams += [tuple(words[place : place + n]) for place in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def measure_rewards(samples: Sequence[Completion]) -> list[float]:
    """The true reward of each sample."""
    return [true_reward(sample.text) for sample in samples]


def measure_fluency(
    samples: Sequence[Completion], base: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> Fluency:
    """Measure a set of samples; ``base`` is the model whose perplexity is taken."""
    texts = [sample.text for sample in samples]
    return Fluency(
        grammatical=statistics.fmean(is_grammatical(sample.prompt, sample.text) for sample in samples),
        sensible=statistics.fmean(is_grammatical(sample.prompt, sample.text, sensible=True) for sample in samples),
        ended=statistics.fmean(sample.ended for sample in samples),
        distinct_1=distinct_n(texts, 1),
        distinct_2=distinct_n(texts, 2),
        distinct_texts=statistics.fmean(texts.count(text) == 1 for text in texts),
        words=statistics.fmean(len(text.split()) for text in texts),
        perplexity=perplexity(base, tokenizer, [sample.prompt for sample in samples], texts),
    )
