"""From sequences' log-probabilities to rankings' losses, and how far rewards and rankings agree."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fastdpo.logps.wide import widened
from fastdpo.loss.gather import picked
from fastdpo.loss.objectives import Rankings
from fastdpo.loss.options import LossOptions
from fastdpo.loss.pair_losses import given_options, scores_of
from fastdpo.loss.units import Part


class RankingLosses:
    """The losses of R rankings as a function of their sequences' sums, for all of them or for some.

    Args:
        options: which loss.
        lengths: [S, 1] int64, the scored tokens of each sequence.
        ref_sums: [S, 1], the reference's log-probabilities; None for no reference.
        rankings: [R, K] int64, sequences, the best first, filled up with -1.
        allow_empty: whether sequences may have no scored token; their means are 0, as their sums are.
    """

    def __init__(
        self,
        options: LossOptions,
        lengths: Tensor,
        ref_sums: Tensor | None,
        rankings: Tensor,
        *,
        allow_empty: bool = False,
    ) -> None:
        self.options, self.rankings = options, rankings
        tokens = lengths.sum(1)
        self._tokens = tokens.clamp(min=1) if allow_empty else tokens
        self._is_member = rankings >= 0
        self._members = rankings.clamp(min=0)
        self._best = self._members[:, 0]
        last = self._is_member.sum(1, keepdim=True) - 1
        self._worst = self._members.gather(1, last).squeeze(1)
        self._ref_logps = None if ref_sums is None else self._of_sequences(ref_sums.detach(), self._tokens)

    def __call__(self, sums: Tensor, extras: Mapping[str, Tensor], part: Part | None = None) -> Tensor:
        """Losses [n] of the rankings of ``part``, by default of all, from the sums [s, 1] of their sequences."""
        (objective,), (factor,) = self.options.objectives, self.options.weights
        places, is_member, members = self._members, self._is_member, self._members
        if part is not None:
            assert part.members is not None
            places, is_member, members = part.members, is_member[part.units], members[part.units]
        of = members.flatten()
        ratios = self._of_sequences(picked(sums, places.flatten()), self._tokens.index_select(0, of))
        if self._ref_logps is not None:
            ratios = ratios - self._ref_logps.index_select(0, of)
        rankings = Rankings(scores_of(ratios, self.options).view(members.shape), is_member)
        losses: Tensor = objective.function(rankings, **given_options(self.options, objective.arguments))
        return factor * losses

    def logps(self, sums: Tensor) -> Tensor:
        """[2R]: log-probabilities of each ranking's best sequence, then of each one's last."""
        return torch.cat(self.of_both(self._of_sequences(sums, self._tokens)))

    def sequence_rewards(self, sums: Tensor) -> Tensor:
        """[S], detached: beta times the log-ratio of each sequence."""
        logps = self._of_sequences(sums.detach(), self._tokens)
        return self.options.beta * (logps if self._ref_logps is None else logps - self._ref_logps)

    def rewards(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """[R] each, detached: of each ranking's best sequence, and of its last."""
        return self.of_both(self.sequence_rewards(sums))

    def weights(self, sums: Tensor, extras: Mapping[str, Tensor], part: Part | None = None) -> None:
        """WPO's, which are of pairs: there are none."""

    def _of_sequences(self, sums: Tensor, tokens: Tensor) -> Tensor:
        logps = sums.sum(1)
        return logps / tokens if self.options.average_log_prob else logps

    def of_both(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """[R] each, of what is known of sequences, [S]: each ranking's best one's, and its last one's."""
        return values.index_select(0, self._best), values.index_select(0, self._worst)


def agreement(rewards: Tensor, rankings: Tensor) -> tuple[Tensor, Tensor]:
    """How far rewards [S] order sequences as rankings do: (is the best one's the highest, Kendall's tau), [R] each.

    Tau (Kendall 1938) is the share of a ranking's pairs whose rewards stand in its order, less the share of those that
    stand the other way round: 1 for the same order, -1 for the reverse. Equal rewards count for neither; nor do they
    make the best one the highest.

    Args:
        rewards: any floating dtype.
        rankings: [R, K] int64, sequences, the best first, filled up with -1.
    """
    is_member = rankings >= 0
    values = rewards.detach().index_select(0, rankings.clamp(min=0).flatten()).view(rankings.shape)
    steps = (values.unsqueeze(2) - values.unsqueeze(1)).sign()  # of [r, i, j]: 1 where i's is the higher
    counts = is_member.unsqueeze(2) & is_member.unsqueeze(1)
    counts = counts & torch.ones_like(counts).triu(1)
    tau = widened(steps.where(counts, 0)).sum((1, 2)) / counts.sum((1, 2))
    is_first = ((steps[:, 0] > 0) | ~counts[:, 0]).all(1)
    return widened(is_first.to(rewards.dtype)), tau
