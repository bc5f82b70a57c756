"""What a run costs, part by part: seconds, tokens through each model, and floating-point operations.

Only what is inside a part counts. Evaluations stand outside, and so cost nothing.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

# In the order in which they are printed.
PARTS = {
    "labelling": "sampling the pairs; every arm that learns from pairs pays it",
    "reward model": "fitting the reward model to the pairs",
    "reference": "the reference's log-probabilities of the pairs",
    "rollout": "sampling completions from the policy",
    "scoring": "rewards and the reference's log-probabilities of what was sampled",
    "value": "the value model: its estimates, and its training",
    "update": "training the policy",
}
MODELS = ("policy", "reference", "reward model", "value model")


@dataclass
class Cost:
    """Of one part so far. ``tokens`` by model: those that went through its body, padding included, once a forward."""

    seconds: float = 0.0
    flops: float = 0.0
    tokens: dict[str, int] = field(default_factory=lambda: defaultdict(int))


class Ledger:
    """Adds up a run's costs.

    On the CPU a second is one of CPU time, of all threads together: what else runs on the machine does not count.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.parts: dict[str, Cost] = {name: Cost() for name in PARTS}
        self._device = device
        self._open: str | None = None

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What happens inside belongs to the part ``name``. Parts do not nest."""
        self.begin(name)
        try:
            yield
        finally:
            self.end()

    def begin(self, name: str) -> None:
        """As :meth:`part`, for trainers that call back."""
        if self._open is not None:
            raise RuntimeError(f"{name} begins inside {self._open}")
        self._open, self._start = name, self._now()

    def end(self) -> None:
        """Ends the part that began last."""
        if self._open is None:
            raise RuntimeError("no part is open")
        self.parts[self._open].seconds += self._now() - self._start
        self._open = None

    @property
    def open_part(self) -> str | None:
        """The part that is going on: what hooks ask, which run in evaluations too."""
        return self._open

    def count(self, part: str, model: str, *, tokens: int, flops: float) -> None:
        """Adds tokens that went through ``model``, one of ``MODELS``, and operations, to ``part``."""
        if model not in MODELS:
            raise ValueError(f"model is {model!r}; it should be one of {', '.join(MODELS)}")
        self.parts[part].tokens[model] += tokens
        self.parts[part].flops += flops

    def owe(self, part: str, cost: dict[str, Any]) -> None:
        """Adds what another run's :meth:`snapshot` has for ``part``: this one would have spent it as well."""
        self.parts[part].seconds += cost["seconds"]
        self.parts[part].flops += cost["flops"]
        for model, tokens in cost["tokens"].items():
            self.parts[part].tokens[model] += tokens

    def snapshot(self) -> dict[str, dict[str, Any]]:
        """What has been spent so far, for JSON."""
        return {
            name: {"seconds": cost.seconds, "flops": cost.flops, "tokens": dict(cost.tokens)}
            for name, cost in self.parts.items()
        }

    def _now(self) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()


def forward_flops(config: LlamaConfig, lengths: Tensor | list[int], scored: int) -> float:
    """Operations of one forward: rows of ``lengths`` tokens, padding included, with the head on ``scored`` positions.

    Two for every weight and token in a layer's seven products, attention over half of the square of a row, and two
    for every entry of the head; norms and the softmax are left out. A backward is twice as much.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    keys = hidden * config.num_key_value_heads // config.num_attention_heads
    weights = 2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * config.intermediate_size
    tokens = torch.as_tensor(lengths, dtype=torch.float64)
    body = layers * (2 * weights * tokens.sum() + 2 * hidden * (tokens * tokens).sum())
    return float(body + 2 * scored * hidden * config.vocab_size)


def sampling_flops(config: LlamaConfig, prompts: Tensor, completions: Tensor) -> float:
    """Operations of drawing ``completions`` tokens after ``prompts`` tokens with a key-value cache; both int64 [B].

    A prompt and its completion but for the last token go through the body once; each drawn token takes the head once.
    """
    return forward_flops(config, prompts + completions - 1, int(completions.sum()))
