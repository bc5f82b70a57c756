"""How far apart two right computations of the same log-probabilities may be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

# In units of the last place of the largest log-probability: the same numbers, summed in another order in every layer.
_ROUNDING = 64
# In units of what a change of the embeddings in their last place makes: some models enlarge what they round.
_ENLARGED = 16


def at_most_rounding(largest: float, moved: Tensor, dtype: torch.dtype) -> float:
    """What two right computations may differ by, in nats.

    Args:
        largest: the largest log-probability.
        moved: by how much log-probabilities moved when the embeddings did, under :func:`moved_by_last_place`.
        dtype: what the model computes in.
    """
    # Models take norms and softmaxes in float32, also in float64.
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    return _ROUNDING * eps * largest + _ENLARGED * float(moved.abs().max())


@contextlib.contextmanager
def moved_by_last_place(lm: PreTrainedModel) -> Iterator[None]:
    """The embeddings of tokens are changed in about their last place, each by another amount, until the block ends."""

    def move(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        # A pattern, not random numbers: a run's generators stay as they are.
        pattern = torch.arange(output.numel(), device=output.device).mul(2654435761).remainder(3).sub(1)
        eps = max(torch.finfo(output.dtype).eps, torch.finfo(torch.float32).eps)
        return output * (1 + eps * pattern.reshape(output.shape).to(output.dtype))

    handle = lm.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


def root_mean_square(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())
