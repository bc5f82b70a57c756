"""How the losses are given their reference, whether that will do, and what becomes of it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastdpo.logps.primitive import token_logps
from fastdpo.logps.wide import widened
from fastdpo.loss.options import LossOptions
from fastdpo.loss.sequences import Sequences


class Reference(NamedTuple):
    """:func:`dpo_loss`'s arguments of these names, behind ``ref_``: hidden states, or log-probabilities, or nothing."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    logps: Tensor | None

    def check(self, options: LossOptions, hidden: Tensor) -> None:
        """Raises ValueError unless it is given in one way, and the loss has a place for it; ``hidden`` is policy's."""
        if self.logps is not None and (self.hidden is not None or self.weight is not None or self.bias is not None):
            raise ValueError("ref_logps already is the reference: leave out ref_hidden, ref_weight and ref_bias")
        if self.hidden is None and (self.weight is not None or self.bias is not None):
            raise ValueError("ref_weight and ref_bias belong to ref_hidden, which is None")
        if self.hidden is not None and self.hidden.shape[:-1] != hidden.shape[:-1]:
            raise ValueError(
                f"ref_hidden has shape {tuple(self.hidden.shape)}; all but its last size should be those of hidden, "
                f"{tuple(hidden.shape)}"
            )
        is_given = self.hidden is not None or self.logps is not None
        if is_given and not options.takes_reference:
            name = "ref_hidden" if self.logps is None else "ref_logps"
            raise ValueError(f"{name} is given, but {options.described} has no reference; leave it out")
        if not is_given:
            check_without_reference(options)

    def computed_logps(
        self,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        group: dist.ProcessGroup | None,
        head_options: dict[str, Any],
    ) -> Tensor | None:
        """Log-probabilities: as they were given, or of tokens from the hidden states.

        ``weight`` and ``bias`` are the policy's, for a reference that has no output embedding of its own.
        """
        if self.hidden is None:
            return self.logps
        own_weight, own_bias = self.weight, self.bias
        if own_weight is None:
            own_weight, own_bias = weight, bias if own_bias is None else own_bias
        with torch.no_grad():
            try:
                return token_logps(self.hidden, own_weight, targets, own_bias, group=group, **head_options).logps
            except (TypeError, ValueError) as error:  # which speaks of hidden, weight and bias
                raise type(error)(f"ref_hidden, ref_weight and ref_bias do not go together: {error}") from None


def check_without_reference(options: LossOptions) -> None:
    """Raises ValueError where an option speaks of a reference: there is none."""
    if options.ld_reference is not None:
        raise ValueError(f"ld_reference is {options.ld_reference!r}, but there is no reference; leave it out")
    if options.f_divergence_type != "reverse_kl":
        raise ValueError(
            f"f_divergence_type is {options.f_divergence_type!r}, a divergence from a reference, but none is given"
        )


def reference_sums(
    options: LossOptions, ref_logps: Tensor | None, sequences: Sequences, targets: Tensor, ignore_index: int
) -> Tensor | None:
    """[S, C] or [S, 1] from log-probabilities of tokens or of sequences; ValueError where they will not do."""
    if ref_logps is None:
        return None
    by_segment = options.ld_alpha is not None and options.ld_reference != "policy"
    if ref_logps.shape == targets.shape and (by_segment or ref_logps.shape != sequences.tokens.shape):
        return sequences.segment_sums(ref_logps.where(targets != ignore_index, 0))
    if ref_logps.shape != sequences.tokens.shape:
        raise ValueError(
            f"ref_logps has shape {tuple(ref_logps.shape)}; it should be ({sequences.tokens.numel()},), one a "
            f"completion, or targets' shape {tuple(targets.shape)}, one a token"
        )
    if by_segment:
        raise ValueError(
            "ref_logps has one number a completion, but ld_alpha weighs the reference's tokens as well: give ref_logps "
            "of targets' shape, or ref_hidden, or ld_reference='policy'"
        )
    return widened(ref_logps).unsqueeze(1)
