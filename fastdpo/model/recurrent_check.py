"""What layers with a state do in training, where they may run on another kernel than in evaluation, and backwards."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from fastdpo.model.attention import RowAttention
from fastdpo.model.packing import PackedRow
from fastdpo.model.randomness import without_randomness
from fastdpo.model.scoring import Scorer, score_row

# A share of the largest gradient. What no path leads to has a gradient of 0, whatever is rounded, in 16 bits as well:
# there this sees what is lost in the rounding of log-probabilities.
_NOTHING = 1e-5


def fault_in_training(
    scorer: Scorer, attention: RowAttention, row: PackedRow, packed: Tensor, allowed: float
) -> str | None:
    """What is wrong with a packed row in training mode, in words that follow the model's name; None if nothing is.

    Args:
        scorer: the model.
        attention: for its rows.
        row: made-up sequences, one after another.
        packed: [K], what the model says about the row in evaluation mode.
        allowed: what log-probabilities may differ by, in nats.
    """
    with _training(scorer.root), attention.active():
        # Something around the model (FSDP) has its own ideas of a backward.
        looks_back = scorer.root is scorer.model
        with torch.set_grad_enabled(looks_back), _embedded(scorer) as embedded:
            logps = score_row(scorer.head, scorer.root, row).logps
            others = row.of_sequences(logps)[int(row.cu_seqlens[1]) :].sum()
        error = float((logps.detach() - packed).abs().max())
        if not error <= allowed:
            return (
                "computes something else in packed rows in training mode than in evaluation mode: log-probabilities "
                f"of a made-up row differ by {error:.2g} nats, where {allowed:.2g} would be rounding"
            )
        if not looks_back:
            return None
        (gradient,) = torch.autograd.grad(others, embedded)
        size = gradient.abs().flatten(0, 1).amax(1)
        leak, largest = float(size[: row.segments.query_sizes[0]].max()), float(size.max())
    if not leak <= _NOTHING * largest:
        return (
            "lets the gradient of one completion of a packed row depend on another: that of other sequences' "
            f"log-probabilities is {leak / largest:.2g} of its largest where it should be 0"
        )
    return None


@contextlib.contextmanager
def _training(root: nn.Module) -> Iterator[None]:
    """The model in training mode, without what is random in it, and without recomputing, until the block ends."""
    before = {module: module.training for module in root.modules()}
    try:
        for module in before:
            module.training = not isinstance(module, GradientCheckpointingLayer)
        with without_randomness(root):
            yield
    finally:
        for module, was_training in before.items():
            module.training = was_training


@contextlib.contextmanager
def _embedded(scorer: Scorer) -> Iterator[list[Tensor]]:
    """A list that gets the embeddings of the next call's tokens, as what gradients are wanted of."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.detach().requires_grad_(torch.is_grad_enabled())
        found.append(output)
        return output

    handle = scorer.lm.get_input_embeddings().register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()
