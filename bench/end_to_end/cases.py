"""What is trained: models by name, made from their configuration with random weights, and the run's settings."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

# A Llama's sizes. Vocabularies are the models' own; the tokenizer, made from the data, may fill less of one.
_MODELS: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1_024,
    },
    # 34 million parameters, of which 16 million are the embedding.
    "llama-34m": {
        "hidden_size": 512,
        "intermediate_size": 1_408,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 32_000,
    },
    "llama-1b": {
        "hidden_size": 2_048,
        "intermediate_size": 8_192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
    },
    "llama-8b": {
        "hidden_size": 4_096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128_256,
        "tie_word_embeddings": False,
    },
}


@dataclass(frozen=True)
class TrainCase:
    """A run: ``steps`` optimiser steps of ``pairs`` pairs that count, after ``warmup`` that do not.

    Attributes:
        pairs: of an optimiser step: every two of each prompt's answers.
        answers: of a prompt.
        system_tokens: of a system message that every prompt begins with; 0 for none.
        dtype: what is computed in. bfloat16 is autocast where the weights are float32.
        weights: the dtype of the weights, their gradients and the optimiser's state.
    """

    name: str
    dtype: str
    weights: str
    optim: str
    pairs: int
    max_length: int
    steps: int
    warmup: int
    learning_rate: float
    beta: float
    device: str
    answers: int = 2
    system_tokens: int = 0

    @property
    def config(self) -> dict[str, Any]:
        return _MODELS[self.name]

    @property
    def rows(self) -> int:
        """The pairs that a run takes, each of them once."""
        return self.pairs * (self.steps + self.warmup)

    @property
    def prompts(self) -> int:
        """Of an optimiser step."""
        return self.pairs // pairs_of(self.answers)


def pairs_of(answers: int) -> int:
    """How many pairs there are of so many answers to a prompt."""
    return answers * (answers - 1) // 2


# name -> dtypes that are measured, dtype of the weights, optimiser, tokens, steps
_DEFAULTS: dict[str, tuple[tuple[str, ...], str, str, int, int]] = {
    "tiny": (("float32",), "float32", "adamw_torch_fused", 256, 3),
    "llama-34m": (("float32", "bfloat16"), "float32", "adamw_torch_fused", 1_024, 6),
    "llama-1b": (("bfloat16",), "float32", "adamw_torch_fused", 1_024, 30),
    # Policy, gradients, a reference and AdamW's state do not fit on one device.
    "llama-8b": (("bfloat16",), "bfloat16", "sgd", 1_024, 20),
}
MODELS = tuple(_DEFAULTS)
# Far enough that losses of another computation would differ, and not so far that there is nothing left to learn.
_LEARNING_RATES = {"adamw_torch_fused": 2e-5, "sgd": 1e-3}


def named_cases(name: str, device: str, dtypes: list[str] | None, **changes: Any) -> list[TrainCase]:
    """The model's run in each dtype; changes that are None leave the default."""
    known, weights, optim, length, steps = _DEFAULTS[name]
    case = TrainCase(
        name=name,
        dtype="float32",
        weights=weights,
        optim=optim,
        pairs=4,
        max_length=length,
        steps=steps,
        warmup=2 if device == "cuda" else 1,
        learning_rate=_LEARNING_RATES[optim],
        beta=0.1,
        device=device,
    )
    changes = {key: value for key, value in changes.items() if value is not None}
    return [dataclasses.replace(case, **changes | {"dtype": dtype}) for dtype in dtypes or known]


def make_model(case: TrainCase) -> PreTrainedModel:
    """The same weights wherever it is called, on the case's device."""
    config = LlamaConfig(**{"tie_word_embeddings": True, "max_position_embeddings": 4_096} | case.config)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, case.weights))
    try:
        with torch.device(case.device):
            return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
