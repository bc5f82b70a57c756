"""What is measured: heads of known models, and the batch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import combinations

BETA = 0.1
IGNORE_INDEX = -100


@dataclass(frozen=True)
class Case:
    """One setting: B pairs, 2B rows of T tokens, a head of V x H.

    With more than two ``answers`` to a prompt, the B pairs are all of each prompt's, and the rows are copies of fewer
    sequences: of 4 answers and their 6 pairs 4, in place of 12.
    """

    name: str
    hidden_size: int
    vocab_size: int
    softcap: float | None
    pairs: int
    length: int
    prompt_share: float
    dtype: str
    frozen: bool
    cached: bool
    device: str
    answers: int = 2

    @property
    def prompts(self) -> int:
        return self.pairs // pairs_of(self.answers)

    @property
    def members(self) -> list[int]:
        """[2B] the sequence that each row is, chosen first: the row itself, with two answers."""
        if self.answers == 2:
            return list(range(2 * self.pairs))
        every = [
            (prompt * self.answers + a, prompt * self.answers + b)
            for prompt in range(self.prompts)
            for a, b in combinations(range(self.answers), 2)
        ]
        return [pair[side] for side in (0, 1) for pair in every]

    @property
    def sequences(self) -> int:
        return self.prompts * self.answers

    @property
    def tokens(self) -> int:
        """Of the rows, as all other counts are where nothing else is said."""
        return 2 * self.pairs * self.length

    @property
    def prompt_lengths(self) -> list[int]:
        """Per prompt, the leading positions without a target: around prompt_share of the row, and not all the same."""
        spread = min(self.prompt_share, 1 - self.prompt_share) / 2
        steps = [2 * i / (self.prompts - 1) - 1 if self.prompts > 1 else 0 for i in range(self.prompts)]
        return [min(round(self.length * (self.prompt_share + spread * step)), self.length - 1) for step in steps]

    @property
    def sequence_prompts(self) -> list[int]:
        """The prompt's length before each sequence: two halves with two answers, else prompt after prompt."""
        if self.answers == 2:
            return self.prompt_lengths * 2
        return [length for length in self.prompt_lengths for _ in range(self.answers)]

    @property
    def row_prompts(self) -> list[int]:
        """The same of each row."""
        lengths = self.sequence_prompts
        return [lengths[i] for i in self.members]

    @property
    def scored_tokens(self) -> int:
        return self.tokens - sum(self.row_prompts)

    @property
    def distinct_scored_tokens(self) -> int:
        """Of the sequences, each once."""
        return self.sequences * self.length - sum(self.sequence_prompts)

    @property
    def products(self) -> int:
        """Matrix products a token needs: policy logits, reference logits, gradient of hidden, gradient of weight."""
        return 4 - self.frozen - self.cached

    @property
    def flops(self) -> float:
        return 2.0 * self.products * self.scored_tokens * self.hidden_size * self.vocab_size


def pairs_of(answers: int) -> int:
    """How many pairs there are of so many answers to a prompt."""
    return answers * (answers - 1) // 2


# name -> hidden size, vocabulary, final-logit softcap
HEADS: dict[str, tuple[int, int, float | None]] = {
    "tiny": (128, 4_096, None),
    "small": (512, 32_000, None),
    "qwen2.5-0.5b": (896, 151_936, None),
    "llama-3.2-1b": (2_048, 128_256, None),
    "llama-3.1-8b": (4_096, 128_256, None),
    "gemma-2-2b": (2_304, 256_000, 30.0),
}

# name -> pairs, length; on CUDA every model has 8 pairs of 512 tokens, 8,192 tokens in all.
_CPU_BATCHES = {
    "tiny": (2, 64),
    "small": (4, 256),
    "qwen2.5-0.5b": (2, 512),
    "llama-3.2-1b": (1, 256),
    "llama-3.1-8b": (1, 128),
    "gemma-2-2b": (1, 128),
}


def is_large(name: str) -> bool:
    return name not in ("tiny", "small")


def named_case(name: str, device: str, **changes: object) -> Case:
    """The case of that name with its defaults on the device; changes that are None leave the default."""
    hidden_size, vocab_size, softcap = HEADS[name]
    pairs, length = (8, 512) if device == "cuda" and is_large(name) else _CPU_BATCHES[name]
    case = Case(
        name=name,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        softcap=softcap,
        pairs=pairs,
        length=length,
        prompt_share=0.25 if name == "tiny" else 0.0,
        dtype="bfloat16" if device == "cuda" or is_large(name) else "float32",
        frozen=False,
        cached=False,
        device=device,
    )
    return dataclasses.replace(case, **{key: value for key, value in changes.items() if value is not None})
