"""One DPO step as whoever computes it meets it: the tensors that it is given, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass

from loss_layer.cases import Case
from torch import Tensor


@dataclass
class Problem:
    """The tensors of one step, on the device, and what whoever made the batch knows about it."""

    case: Case
    hidden: Tensor  # [2B, T, H], chosen first; needs a gradient
    weight: Tensor  # [V, H]; needs one unless frozen
    targets: Tensor  # [2B, T]
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_logps: Tensor | None  # [2B], cached
    rows: Tensor | None  # [scored] positions in [2B * T] that have a target; None where all have

    def clear_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def scored(self, values: Tensor) -> Tensor:
        """[2B, T, ...] to [scored, ...]."""
        flat = values.flatten(0, 1)
        return flat if self.rows is None else flat.index_select(0, self.rows)

    def sum_sequences(self, values: Tensor) -> Tensor:
        """[scored] to [2B]."""
        if self.rows is not None:
            values = values.new_zeros(self.targets.numel()).index_copy(0, self.rows, values)
        return values.view(self.targets.shape).sum(-1)


@dataclass
class Outcome:
    """What a step returned, detached. The gradients are in the problem."""

    loss: Tensor
    sequence_logps: Tensor  # [2B]
    token_logps: Tensor | None = None  # [scored]; None where the peer does not tell
