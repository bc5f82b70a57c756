"""Whether two models say the same: their log-probabilities, token by token, on the same rows."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastdpo.model.language_model import embedding_rows, language_model

_ROWS, _LENGTH = 4, 64
# Rows of an embedding that made-up rows hold for certain, of those that an adapter changes by themselves.
_NAMED = 64
# How far float32 takes two orders of the same sums apart: units of the last place of the largest logit, for the root of
# the number of layers, over which roundings add up like steps to either side. 1.1 were seen on SmolLM2-135M, and 4 on
# tiny models whose norms divide by little.
_UNITS = 16
_LEAST_LOGIT = 4.0


@dataclass(frozen=True)
class Difference:
    """Of log-probabilities, a token each: the largest, and the root of the mean square."""

    largest: float
    rms: float

    def __str__(self) -> str:
        return f"{self.largest:.2g} at most, {self.rms:.2g} on average (root mean square)"


def made_up_rows(model: PreTrainedModel, changed: Collection[int] = ()) -> list[list[int]]:
    """Rows of tokens drawn from the vocabulary, with those of ``changed`` (the first of them) among them."""
    size = embedding_rows(model)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _LENGTH
    length = min(_LENGTH, limit)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(size, (_ROWS, length), generator=generator)
    named = sorted(token for token in changed if 0 <= token < size)[:_NAMED]
    places = torch.randperm(rows.numel(), generator=generator)[: len(named)]
    rows.view(-1)[places] = torch.tensor(named, dtype=rows.dtype)
    return rows.tolist()


@torch.no_grad()
def logps_of(model: Any, rows: Sequence[Sequence[int]]) -> tuple[Tensor, float]:
    """Log-probabilities of each token after the first, row after row, in float64 on the CPU; and the largest logit."""
    found, largest = [], 0.0
    for row in rows:
        ids = torch.tensor([row], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        largest = max(largest, logits.abs().max().item())
        found.append(logits.log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0].double().cpu())
    return torch.cat(found), largest


def difference(logps: Tensor, others: Tensor) -> Difference:
    """Of the one from the other; infinite where one of them is no number."""
    apart = (logps - others).abs()
    if not bool(apart.isfinite().all()):
        return Difference(math.inf, math.inf)
    return Difference(apart.max().item(), apart.square().mean().sqrt().item())


@dataclass(frozen=True)
class Kept:
    """What a stored model keeps of what an adapter does.

    Attributes:
        share: of the change of log-probabilities, the part that goes its way; 0 where rounding took all of it back to
            the base, and about 1 where rounding is noise.
        error: the standard error of ``share``, by what goes another way.
    """

    share: float
    error: float

    @property
    def is_lost(self) -> bool:
        """Whether less than half is kept, beyond doubt."""
        return self.share + 2 * self.error < 0.5

    @property
    def is_unclear(self) -> bool:
        """Whether the noise of rounding is too much to tell."""
        return self.error > 0.25

    def __str__(self) -> str:
        return f"{100 * self.share:.0f} ± {100 * self.error:.0f} %"


def kept(base: Tensor, live: Tensor, stored: Tensor) -> Kept | None:
    """Of log-probabilities by the base, the live adapter and the stored model; None where the adapter does nothing."""
    effect, found = live - base, stored - base
    size = effect.square().sum()
    if not bool(size > 0) or not bool(found.isfinite().all()):
        return None
    share = (found * effect).sum() / size
    rest = (found - share * effect).square().sum() / max(1, len(effect) - 1)
    return Kept(share.item(), (rest / size).sqrt().item())


def tolerance(model: Any, largest_logit: float) -> float:
    """By how much log-probabilities of a model in float32 may differ for the order of its sums alone."""
    layers = getattr(language_model(model).config.get_text_config(), "num_hidden_layers", 1)
    return _UNITS * torch.finfo(torch.float32).eps * max(_LEAST_LOGIT, largest_logit) * math.sqrt(1 + layers)
