"""The exact tier's task: a language of four letters, in which every completion can be enumerated."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from against_rlhf.task import Task
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastdpo.demo.corpus import Review
from fastdpo.demo.language_model import END, PADDING, build_model, pretrain
from fastdpo.demo.sampling import Completion

LETTERS = "abcd"
# The end token parts texts, as in a stream of them; without it a model can hardly tell a prompt from a text's letter.
PROMPTS = tuple(END + letter for letter in LETTERS)
LONGEST = 4  # letters of a completion that is not cut
REWARD_SD = 1.75  # over what the language says, in log-odds of preference

# Chance that a text of the language ends after its first letter, the second, the third. The limit is a letter further:
# a completion is cut where it misses two ends. Pairs hold no cut text, so DPO cannot learn how rare these should be.
_ENDS = (0.2, 0.3, 1.0)
_SPREAD = 0.8  # sd of the logarithms of the language's weights


def make_exact_task(
    seed: int, *, corpus_size: int = 6400, steps: int = 600, hidden_size: int = 64, layers: int = 2
) -> Task:
    """A small Llama that has learned the language, and a reward on it that depends on the prompt.

    A completion is up to four letters. The four prompts are the held-out prompts too: all that can be asked.
    """
    language = _Language.drawn(random.Random(f"{seed}/language"))
    rng = random.Random(f"{seed}/corpus")
    corpus = [language.write(prompt, rng) for prompt in PROMPTS * (corpus_size // len(PROMPTS))]
    tokenizer = letter_tokenizer()
    model = build_model(tokenizer, hidden_size=hidden_size, layers=layers, seed=seed, max_positions=16)
    batches = random.Random(f"{seed}/batches")
    pretrain(model, tokenizer, corpus, steps=steps, batch_size=64, learning_rate=6e-3, rng=batches)
    reward = TableReward.drawn(random.Random(f"{seed}/reward"), corpus)
    return Task("exact", model, tokenizer, list(PROMPTS), list(PROMPTS), reward, LONGEST + 1)


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each letter, the end and the padding. Texts and their tokens tell each other."""
    core = Tokenizer(models.WordLevel({name: i for i, name in enumerate((PADDING, END, *LETTERS))}, unk_token=PADDING))
    core.add_special_tokens([AddedToken(name, special=True) for name in (PADDING, END)])
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PADDING,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class _Language:
    """A Markov chain over letters: the first follows the prompt, each next one the letter before and the prompt.

    Attributes:
        weights: (prompt, letter before, or none at the start) -> weights of LETTERS.
    """

    weights: dict[tuple[str, str], list[float]]

    @classmethod
    def drawn(cls, rng: random.Random) -> _Language:
        contexts = itertools.product(PROMPTS, ["", *LETTERS])
        return cls({context: [rng.lognormvariate(0, _SPREAD) for _ in LETTERS] for context in contexts})

    def write(self, prompt: str, rng: random.Random) -> Review:
        text = ""
        for end in _ENDS:
            text += rng.choices(LETTERS, self.weights[prompt, text[-1:]])[0]
            if rng.random() < end:
                break
        return Review(prompt, text)


@dataclass(frozen=True)
class TableReward:
    """A sum over a text's letters and over its neighbours, scaled; a text that was cut has the lowest there is.

    Attributes:
        terms: (prompt, letter or two neighbouring letters) -> what it adds.
        mean, sd: of the sums over the language.
        lowest: the smallest sum of any text.
    """

    terms: dict[tuple[str, str], float]
    mean: float
    sd: float
    lowest: float

    @classmethod
    def drawn(cls, rng: random.Random, corpus: Sequence[Review]) -> TableReward:
        pieces = [*LETTERS, *map("".join, itertools.product(LETTERS, repeat=2))]
        terms = {key: rng.gauss(0, 1) for key in itertools.product(PROMPTS, pieces)}
        raw = cls(terms, mean=0.0, sd=REWARD_SD, lowest=0.0)
        sums = [raw._sum(review.prompt, review.text) for review in corpus]
        texts = ("".join(text) for length in range(LONGEST + 1) for text in itertools.product(LETTERS, repeat=length))
        lowest = min(raw._sum(prompt, text) for prompt, text in itertools.product(PROMPTS, texts))
        return cls(terms, statistics.mean(sums), statistics.pstdev(sums), lowest)

    def __call__(self, completions: Sequence[Completion]) -> list[float]:
        sums = [self._sum(c.prompt, c.text) if c.ended else self.lowest for c in completions]
        return [REWARD_SD * (total - self.mean) / self.sd for total in sums]

    def _sum(self, prompt: str, text: str) -> float:
        pieces = [*text, *map("".join, itertools.pairwise(text))]
        return sum(self.terms[prompt, piece] for piece in pieces)
