"""One DPO step as whoever computes it meets it: the tensors that it is given, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from loss_layer.cases import IGNORE_INDEX, Case
from torch import Tensor


@dataclass
class Problem:
    """The tensors of one step, on the device, and what whoever made the batch knows about it.

    S sequences are 2B rows, chosen first; or, with more than two answers to a prompt, those that pairs point into,
    until ``in_rows`` copies them into 2B rows.
    """

    case: Case
    hidden: Tensor  # [S, T, H]; needs a gradient
    weight: Tensor  # [V, H]; needs one unless frozen
    targets: Tensor  # [S, T]
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_logps: Tensor | None  # [S], cached
    rows: Tensor | None  # [scored] positions in [S * T] that have a target; None where all have
    pairs: Tensor | None = None  # [B, 2] into the sequences; None where these are the two halves
    original: Problem | None = None  # what the rows are copies of; None where they are none

    def clear_gradients(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def scored(self, values: Tensor) -> Tensor:
        """[S, T, ...] to [scored, ...]."""
        flat = values.flatten(0, 1)
        return flat if self.rows is None else flat.index_select(0, self.rows)

    def sum_sequences(self, values: Tensor) -> Tensor:
        """[scored] to [S]."""
        return self._in_place(values).sum(-1)

    def _in_place(self, values: Tensor) -> Tensor:
        """[scored] to [S, T], 0 where nothing is scored."""
        if self.rows is not None:
            values = values.new_zeros(self.targets.numel()).index_copy(0, self.rows, values)
        return values.view(self.targets.shape)

    @property
    def members(self) -> Tensor:
        """[2B] the sequence that each pair's chosen one is, and then each one's rejected."""
        if self.pairs is None:
            return torch.arange(len(self.targets), device=self.targets.device)
        return self.pairs.t().flatten()

    def in_rows(self) -> Problem:
        """The same as 2B rows, chosen first, for whoever takes nothing else."""
        if self.pairs is None:
            return self
        members = self.members
        targets = self.targets[members]
        return Problem(
            case=self.case,
            hidden=self.hidden.detach()[members].requires_grad_(),
            weight=self.weight,
            targets=targets,
            ref_hidden=None if self.ref_hidden is None else self.ref_hidden[members],
            ref_weight=self.ref_weight,
            ref_logps=None if self.ref_logps is None else self.ref_logps[members],
            rows=scored_positions(targets),
            original=self,
        )

    def copied(self, values: Tensor) -> Tensor:
        """[scored] of the sequences that the rows are copies of, to [scored] of the rows."""
        if self.original is None:
            return values
        return self.scored(self.original._in_place(values)[self.original.members])

    def summed_over_copies(self, gradient: Tensor) -> Tensor:
        """[S, T, H] of the rows, to what it is of the sequences that they are copies of, in float64: [scored, H]."""
        if self.original is None:
            return self.scored(gradient).double()
        whole = torch.zeros_like(self.original.hidden, dtype=torch.float64)
        return self.original.scored(whole.index_add(0, self.original.members, gradient.double()))


def scored_positions(targets: Tensor) -> Tensor | None:
    """[scored] positions in the flattened targets that have one; None where all have."""
    has_one = targets.flatten() != IGNORE_INDEX
    return None if has_one.all() else has_one.nonzero().squeeze(-1)


@dataclass
class Outcome:
    """What a step returned, detached. The gradients are in the problem."""

    loss: Tensor
    sequence_logps: Tensor  # [2B], chosen first
    token_logps: Tensor | None = None  # [scored]; None where the peer does not tell
