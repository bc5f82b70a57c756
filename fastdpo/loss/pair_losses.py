"""From sequences' log-probabilities to pairs' losses: what every entry point does once it has the sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdpo.logps.wide import widened
from fastdpo.loss.objectives import OBJECTIVES, Pairs, divergence_scores
from fastdpo.loss.options import LossOptions

_SFT = OBJECTIVES["sft"]
_DIVERGENCE = ("f_divergence_type", "f_alpha_divergence_coef")


def mixed_losses(pairs: Pairs, options: LossOptions) -> Tensor:
    """[B]: the losses that ``options`` names, added up."""
    if options.f_divergence_type != "reverse_kl":
        divergence = _given(options, _DIVERGENCE)
        chosen, rejected = (divergence_scores(ratios, **divergence) for ratios in (pairs.chosen, pairs.rejected))
        pairs = pairs._replace(chosen=chosen, rejected=rejected)
    total = torch.zeros_like(pairs.chosen_logps)
    for objective, weight in zip(options.objectives, options.weights, strict=True):
        losses = objective.function(pairs, **_given(options, objective.arguments))
        sft_weight = objective.sft_weight if options.sft_weight is None else options.sft_weight
        if sft_weight:
            losses = losses + sft_weight * _SFT.function(pairs, **_given(options, _SFT.arguments))
        total = total + weight * losses
    return total


def mixed_rewards(pairs: Pairs, options: LossOptions) -> tuple[Tensor, Tensor]:
    """beta times the log-ratios, or times what a loss without a reference has in their place; [B] each, detached."""
    chosen, rejected = pairs.chosen.detach(), pairs.rejected.detach()
    if all(objective.means_as_rewards for objective in options.objectives):
        chosen, rejected = pairs.per_token(chosen, rejected)
    return options.beta * chosen, options.beta * rejected


def _given(options: LossOptions, names: Sequence[str]) -> dict[str, Any]:
    """The options of these names, without those that are None: their defaults stand where they are used."""
    values = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def combine_segments(sums: Tensor, options: LossOptions, *, of_policy: bool) -> Tensor:
    """[2n, S] to [2n]: a sequence's log-probability from those of its segments (LD-DPO's weights, if any)."""
    if options.ld_alpha is not None and sums.shape[1] == 2 and (of_policy or options.ld_reference != "policy"):
        return sums[:, 0] + options.ld_alpha * sums[:, 1]
    return sums.sum(1)


class PairLosses:
    """The losses of B pairs as a function of their sequences' sums, for all pairs or for some of them.

    Args:
        options: which losses.
        lengths: [2B, S] int64, the scored tokens of each sequence's segments, the chosen ones first (see
            :class:`fastdpo.loss.sequences.Sequences`).
        ref_sums: [2B, S] or [2B, 1], the reference's log-probabilities of the segments, or of whole sequences; None
            for no reference.
        allow_empty: whether sequences may have no scored token; their means are 0, as their sums are.
    """

    def __init__(
        self, options: LossOptions, lengths: Tensor, ref_sums: Tensor | None, *, allow_empty: bool = False
    ) -> None:
        self.options = options
        self._tokens = lengths.sum(1)
        self._batch_tokens = widened(self._tokens.chunk(2)[0]).mean()
        if allow_empty:  # from here on they divide alone: 0 / 1
            self._batch_tokens = self._batch_tokens.clamp(min=2 / len(self._tokens))
            self._tokens = self._tokens.clamp(min=1)
        self._ref_logps = None
        if ref_sums is not None:
            self._ref_logps = self._of_sequences(ref_sums.detach(), self._tokens, of_policy=False)

    def logps(self, sums: Tensor) -> Tensor:
        """[2B]: the log-probabilities that the losses are functions of, from the segments' [2B, S]."""
        return self._of_sequences(sums, self._tokens, of_policy=True)

    def __call__(self, sums: Tensor, extras: Mapping[str, Tensor], first: int, last: int) -> Tensor:
        """Losses [n] of the pairs [first, last), n of them.

        Args:
            sums: [2n, S], the policy's log-probabilities of their segments.
            extras: sums over their sequences, [2n], of token-wise outputs; ``log_sum_sq_probs`` is needed for WPO.
        """
        losses = mixed_losses(self._pairs(sums, first, last), self.options)
        weights = self.weights(sums, extras, first, last)
        return losses if weights is None else losses * weights

    def rewards(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """[B] each, detached, of all pairs."""
        return mixed_rewards(self._pairs(sums.detach(), 0, len(sums) // 2), self.options)

    def weights(self, sums: Tensor, extras: Mapping[str, Tensor], first: int, last: int) -> Tensor | None:
        """[n] WPO's weights of the pairs [first, last), without a gradient (arXiv 2406.11827, eq. 2); None for none."""
        if not self.options.use_weighting:
            return None
        # Of each token's probability over the sum of the vocabulary's squared ones, the geometric mean.
        aligned = sums.detach().sum(1) - extras["log_sum_sq_probs"]
        chosen, rejected = (aligned / self._part(self._tokens, first, last)).exp().chunk(2)
        return chosen * rejected

    def _pairs(self, sums: Tensor, first: int, last: int) -> Pairs:
        tokens = self._part(self._tokens, first, last)
        logps = self._of_sequences(sums, tokens, of_policy=True)
        ref_logps = None if self._ref_logps is None else self._part(self._ref_logps, first, last)
        ratios = logps if ref_logps is None else logps - ref_logps
        chosen, rejected = ratios.chunk(2)
        chosen_logps, rejected_logps = logps.chunk(2)
        chosen_tokens, rejected_tokens = tokens.chunk(2)
        ref_chosen_logps, ref_rejected_logps = (0.0, 0.0) if ref_logps is None else ref_logps.chunk(2)
        return Pairs(
            chosen,
            rejected,
            chosen_logps,
            rejected_logps,
            ref_chosen_logps,
            ref_rejected_logps,
            chosen_nll=-sums.sum(1).chunk(2)[0],
            chosen_tokens=chosen_tokens,
            rejected_tokens=rejected_tokens,
            batch_tokens=self._batch_tokens,
        )

    def _of_sequences(self, sums: Tensor, tokens: Tensor, *, of_policy: bool) -> Tensor:
        logps = combine_segments(sums, self.options, of_policy=of_policy)
        return logps / tokens if self.options.average_log_prob else logps

    def _part(self, values: Tensor, first: int, last: int) -> Tensor:
        """Of [2B] values those of the pairs [first, last), [2n]."""
        pairs = len(self._tokens) // 2
        if (first, last) == (0, pairs):
            return values
        return torch.cat((values[first:last], values[pairs + first : pairs + last]))
