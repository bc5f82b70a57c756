"""From sequences' log-probabilities to pairs' losses: what every entry point does once it has the sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdpo.logps.wide import widened
from fastdpo.loss.gather import picked
from fastdpo.loss.objectives import OBJECTIVES, Pairs, divergence_scores
from fastdpo.loss.options import LossOptions
from fastdpo.loss.units import Part

_SFT = OBJECTIVES["sft"]
_DIVERGENCE = ("f_divergence_type", "f_alpha_divergence_coef")


def mixed_losses(pairs: Pairs, options: LossOptions) -> Tensor:
    """[B]: the losses that ``options`` names, added up."""
    pairs = pairs._replace(chosen=scores_of(pairs.chosen, options), rejected=scores_of(pairs.rejected, options))
    total = torch.zeros_like(pairs.chosen_logps)
    for objective, weight in zip(options.objectives, options.weights, strict=True):
        losses = objective.function(pairs, **given_options(options, objective.arguments))
        sft_weight = objective.sft_weight if options.sft_weight is None else options.sft_weight
        if sft_weight:
            losses = losses + sft_weight * _SFT.function(pairs, **given_options(options, _SFT.arguments))
        total = total + weight * losses
    return total


def scores_of(log_ratios: Tensor, options: LossOptions) -> Tensor:
    """What stands in the log-ratios' place: they themselves, or under another divergence its f'(ratio)."""
    if options.f_divergence_type == "reverse_kl":
        return log_ratios
    return divergence_scores(log_ratios, **given_options(options, _DIVERGENCE))


def mixed_rewards(pairs: Pairs, options: LossOptions) -> tuple[Tensor, Tensor]:
    """beta times the log-ratios, or times what a loss without a reference has in their place; [B] each, detached."""
    chosen, rejected = pairs.chosen.detach(), pairs.rejected.detach()
    if all(objective.means_as_rewards for objective in options.objectives):
        chosen, rejected = pairs.per_token(chosen, rejected)
    return options.beta * chosen, options.beta * rejected


def given_options(options: LossOptions, names: Sequence[str]) -> dict[str, Any]:
    """The options of these names, without those that are None: their defaults stand where they are used."""
    values = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def combine_segments(sums: Tensor, options: LossOptions, *, of_policy: bool) -> Tensor:
    """[2n, S] to [2n]: a sequence's log-probability from those of its segments (LD-DPO's weights, if any)."""
    if options.ld_alpha is not None and sums.shape[1] == 2 and (of_policy or options.ld_reference != "policy"):
        return sums[:, 0] + options.ld_alpha * sums[:, 1]
    return sums.sum(1)


class PairLosses:
    """The losses of P pairs as a function of their sequences' sums, for all pairs or for some of them.

    Args:
        options: which losses.
        lengths: [S, C] int64, the scored tokens of each sequence's segments (see
            :class:`fastdpo.loss.sequences.Sequences`).
        ref_sums: [S, C] or [S, 1], the reference's log-probabilities of the segments, or of whole sequences; None
            for no reference.
        pairs: [P, 2] int64, which sequence is chosen and which rejected; None where the first half of the sequences is
            chosen, and the second rejected.
        weights: [P], what each pair counts in the batch, where its losses depend on each other or on the batch's
            tokens; None where all count the same. The losses are not multiplied by them.
        batch_margin: [], the mean of beta times the log-ratios' difference over a batch that these pairs are a part
            of, for the loss that asks; None where they are all of it.
        margins: [P], what each pair's margin is to exceed; None for 0.
        allow_empty: whether sequences may have no scored token; their means are 0, as their sums are.
    """

    def __init__(
        self,
        options: LossOptions,
        lengths: Tensor,
        ref_sums: Tensor | None,
        *,
        pairs: Tensor | None = None,
        weights: Tensor | None = None,
        margins: Tensor | None = None,
        batch_margin: Tensor | None = None,
        allow_empty: bool = False,
    ) -> None:
        self.options = options
        self._members = None if pairs is None else pairs.t().flatten()  # [2P], the chosen ones first
        self._weights, self._margins, self._batch_margin = weights, margins, batch_margin
        lengths = self._of_members(lengths, self._members)
        self._tokens = lengths.sum(1)
        self._within = None
        if pairs is not None and options.ld_alpha is not None:
            shorter = torch.minimum(*self._tokens.chunk(2)).repeat(2)
            self._within = lengths.cumsum(1) <= shorter.unsqueeze(1)
        chosen_tokens = widened(self._tokens.chunk(2)[0])
        self._batch_tokens = (
            chosen_tokens.mean() if weights is None else (chosen_tokens * weights).sum() / weights.sum()
        )
        if allow_empty:  # from here on they divide alone: 0 / 1
            self._batch_tokens = self._batch_tokens.clamp(min=2 / len(self._tokens))
            self._tokens = self._tokens.clamp(min=1)
        self._ref_logps = None
        if ref_sums is not None:
            of_pairs = self._segments(ref_sums.detach(), self._members, self._within)
            self._ref_logps = self._of_sequences(of_pairs, self._tokens, of_policy=False)

    def of_both(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """[P] each, of what is known of sequences, [S]: the chosen ones', and the rejected ones'."""
        chosen, rejected = self._of_members(values, self._members).chunk(2)
        return chosen, rejected

    def logps(self, sums: Tensor) -> Tensor:
        """[2P], the chosen ones first: what the losses are functions of, from the segments' [S, C]."""
        return self._of_sequences(self._segments(sums, self._members, self._within), self._tokens, of_policy=True)

    def __call__(self, sums: Tensor, extras: Mapping[str, Tensor], part: Part | None = None) -> Tensor:
        """Losses [n] of the pairs of ``part``, n of them; by default of all.

        Args:
            sums: [s, C], the policy's log-probabilities of their sequences' segments.
            extras: sums over their sequences, [s], of token-wise outputs; ``log_sum_sq_probs`` is needed for WPO.
        """
        losses = mixed_losses(self._pairs(sums, part), self.options)
        weights = self.weights(sums, extras, part)
        return losses if weights is None else losses * weights

    def rewards(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """[P] each, detached, of all pairs."""
        return mixed_rewards(self._pairs(sums.detach(), None), self.options)

    def weights(self, sums: Tensor, extras: Mapping[str, Tensor], part: Part | None = None) -> Tensor | None:
        """[n] WPO's weights of pairs, without a gradient (arXiv 2406.11827, eq. 2); None for none."""
        if not self.options.use_weighting:
            return None
        # Of each token's probability over the sum of the vocabulary's squared ones, the geometric mean.
        members = self._members if part is None else _chosen_first(part.members)
        aligned = self._of_members(sums.detach().sum(1) - extras["log_sum_sq_probs"], members)
        chosen, rejected = (aligned / self._part(self._tokens, part)).exp().chunk(2)
        return chosen * rejected

    def _pairs(self, sums: Tensor, part: Part | None) -> Pairs:
        members = self._members if part is None else _chosen_first(part.members)
        tokens = self._part(self._tokens, part)
        sums = self._segments(sums, members, None if self._within is None else self._part(self._within, part))
        logps = self._of_sequences(sums, tokens, of_policy=True)
        ref_logps = None if self._ref_logps is None else self._part(self._ref_logps, part)
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
            weights=self._weights if self._weights is None or part is None else self._weights[part.units],
            batch_margin=self._batch_margin,
            offsets=self._margins if self._margins is None or part is None else self._margins[part.units],
        )

    @staticmethod
    def _of_members(values: Tensor, members: Tensor | None) -> Tensor:
        """[2n, ...], the chosen ones first, of what is known of their sequences."""
        return values if members is None else picked(values, members)

    def _segments(self, sums: Tensor, members: Tensor | None, within: Tensor | None) -> Tensor:
        """[2n, 1 or 2]: of pairs' sequences; those within and beyond the shorter one's length where ``within`` says."""
        sums = self._of_members(sums, members)
        if within is None or sums.shape[1] != within.shape[1]:
            return sums
        return torch.stack([sums.where(within, 0).sum(1), sums.where(~within, 0).sum(1)], dim=1)

    def _of_sequences(self, sums: Tensor, tokens: Tensor, *, of_policy: bool) -> Tensor:
        logps = combine_segments(sums, self.options, of_policy=of_policy)
        return logps / tokens if self.options.average_log_prob else logps

    def _part(self, values: Tensor, part: Part | None) -> Tensor:
        """Of [2P, ...] values those of a part's pairs, [2n, ...]."""
        if part is None:
            return values
        pairs = len(values) // 2
        return torch.cat((values[:pairs][part.units], values[pairs:][part.units]))


def _chosen_first(members: Tensor | None) -> Tensor | None:
    return None if members is None else members.t().flatten()
