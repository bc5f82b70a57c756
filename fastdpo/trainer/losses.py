"""The loss of a batch of pairs, and what metrics are made of."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.logps.wide import widened
from fastdpo.loss.options import LossOptions
from fastdpo.loss.pair_losses import PairLosses
from fastdpo.loss.ranking_losses import RankingLosses, agreement
from fastdpo.model.scoring import Scorer, SequenceScores, count_sequences, in_pair_order, micro_batches
from fastdpo.trainer.batch_beta import BatchBeta
from fastdpo.trainer.reference import Reference

# The per-token outputs of the policy that metrics are made of.
_OUTPUTS = ("entropy", "mean_logits", "is_top1")


class BatchLosses:
    """What a policy's batches cost.

    Args:
        policy: what is trained.
        reference: what it is compared with.
        options: of the loss.
        aux_loss_coef: the weight of a mixture of experts' load-balancing loss; 0 for none.
        margin_alpha: the factor of what margins are to exceed, which batches have as ``pair_margins``; None for 0.
        batch_beta: of ``beta_dpo``; None for another loss.

    Attributes:
        aux_loss_coef: as above. Where the model can only be looked at once it is sharded, set then.
    """

    def __init__(
        self,
        policy: Scorer,
        reference: Reference,
        options: LossOptions,
        aux_loss_coef: float,
        margin_alpha: float | None = None,
        batch_beta: BatchBeta | None = None,
    ) -> None:
        self._batch_beta = batch_beta
        self._policy, self._reference, self._margin_alpha = policy, reference, margin_alpha
        self._options, self.aux_loss_coef = options, aux_loss_coef
        # What metrics say of pairs is the same whatever the loss of rankings is.
        names = ("beta", "average_log_prob")
        as_pairs = LossOptions(**{name: getattr(options, name) for name in names})
        self._pair_options = as_pairs if options.of_rankings else options

    def __call__(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each pair times its weight [P] float64, and what metrics are made of, each detached, [P] float64.

        Of rankings, what is one a row stands with the row's first pair, and is 0 with the others.

        Args:
            model: the policy, as it is called now; it may be wrapped.
            inputs: a batch, on the device.
        """
        parts = [self._of_part(model, part) for part in micro_batches(inputs)]
        losses = in_pair_order([losses for losses, _ in parts], inputs)
        return losses, {name: in_pair_order([sums[name] for _, sums in parts], inputs) for name in parts[0][1]}

    def _of_part(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        # The reference goes first: what the policy keeps for its backward is then not yet there.
        ref_sums = self._reference.sums(model, inputs)
        kwargs = {"output_router_logits": True} if self.aux_loss_coef else {}
        outputs = (*_OUTPUTS, "log_sum_sq_probs") if self._options.use_weighting else _OUTPUTS
        at_shorter = self._options.ld_alpha is not None
        scores = self._policy.score(inputs, outputs, root=model, at_shorter=at_shorter, **kwargs)
        out, of_sequences = scores.in_pairs(), ref_sums
        if self._options.of_rankings and ref_sums is not None:
            ref_sums = ref_sums.index_select(0, scores.pairs.t().flatten())
        given = inputs.get("pair_weights")
        weights = None if given is None else widened(given)
        margins = self._margins_in(inputs)
        losses_of = PairLosses(self._pair_options, out.lengths, ref_sums, weights=weights, margins=margins)
        chosen_rewards, rejected_rewards = losses_of.rewards(out.sums)
        chosen, rejected = losses_of.logps(out.sums.detach()).chunk(2)
        counts = torch.ones_like(chosen) if weights is None else weights
        if self._batch_beta is not None:
            options, mean = self._with_beta(chosen_rewards - rejected_rewards, counts)
            losses_of = PairLosses(options, out.lengths, ref_sums, weights=weights, batch_margin=mean)
        answer_rewards = None
        if self._options.of_rankings:
            answer_rewards = self._rewards_of_sequences(scores, of_sequences)
            losses, counts = self._of_rankings(scores, of_sequences, inputs, counts)
        else:
            losses = losses_of(out.sums, out.outputs)
            losses = losses if weights is None else losses * weights
        chosen_tokens, rejected_tokens = out.tokens.chunk(2)
        chosen_logits, rejected_logits = out.outputs["mean_logits"].chunk(2)
        chosen_entropy, rejected_entropy = out.outputs["entropy"].chunk(2)
        sums = {
            "pairs": torch.ones_like(chosen),
            "weight": counts,
            "tokens": chosen_tokens + rejected_tokens,
            "chosen_tokens": chosen_tokens,
            "rejected_tokens": rejected_tokens,
            "chosen_reward": chosen_rewards,
            "rejected_reward": rejected_rewards,
            "accuracy": chosen_rewards > rejected_rewards,
            "margin": chosen_rewards - rejected_rewards,
            "chosen_logp": chosen,
            "rejected_logp": rejected,
            "chosen_logits": chosen_logits,
            "rejected_logits": rejected_logits,
            "entropy": chosen_entropy + rejected_entropy,
            "chosen_top1": out.outputs["is_top1"].chunk(2)[0],
            **_agreements(torch.cat((chosen_rewards, rejected_rewards)), inputs, answer_rewards, by_pair=at_shorter),
        }
        if self.aux_loss_coef:
            losses = losses + self.aux_loss_coef * counts * out.model_output.aux_loss
            sums["aux_loss"] = out.model_output.aux_loss.expand_as(losses)
        sums["loss"] = losses
        return losses, {name: widened(values.detach()) for name, values in sums.items()}

    def _with_beta(self, margins: Tensor, counts: Tensor) -> tuple[LossOptions, Tensor | None]:
        """The options and the batch's margin with which ``beta_dpo`` trains; it evaluates with beta as it was given."""
        assert self._batch_beta is not None
        if not torch.is_grad_enabled():
            return replace(self._pair_options, beta_dpo_alpha=0.0), None
        mean = self._batch_beta.margin_of(margins, counts)
        return replace(self._pair_options, beta_dpo_threshold=self._batch_beta.threshold), mean

    def _margins_in(self, inputs: dict[str, Any]) -> Tensor | None:
        """What the margins of a micro-batch's pairs are to exceed, [P]; None for 0."""
        if self._margin_alpha is None:
            return None
        if "pair_margins" not in inputs:
            raise ValueError("margin_alpha is given, and a batch has no pair_margins; its rows should have a 'margin'")
        return self._margin_alpha * widened(inputs["pair_margins"])

    def _rewards_of_sequences(self, scores: SequenceScores, ref_sums: Tensor | None) -> Tensor:
        """[S], also of those that are in no pair, and in rankings alone: each beside itself."""
        itself = torch.arange(len(scores.sums), device=scores.sums.device).unsqueeze(1).expand(-1, 2)
        return PairLosses(self._pair_options, scores.lengths, ref_sums, pairs=itself).rewards(scores.sums)[0]

    def _of_rankings(
        self, scores: SequenceScores, ref_sums: Tensor | None, inputs: dict[str, Any], weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The losses of a micro-batch's rankings, and what they count, [P] each.

        A pair is a ranking of two, also where other rows are groups.
        """

        def losses_of(rankings: Tensor) -> Tensor:
            return RankingLosses(self._options, scores.lengths, ref_sums, rankings)(scores.sums, {})

        if "rankings" not in inputs:
            return losses_of(scores.pairs) * weights, weights
        losses, counts = torch.zeros_like(weights), torch.zeros_like(weights)
        if len(inputs["rankings"]) < len(inputs["rows"]):
            counts = weights.where(~torch.isin(inputs["pair_rows"], inputs["ranking_rows"]), 0)
            losses = losses_of(scores.pairs) * counts
        first = _first_pairs(inputs)
        return losses.index_copy(0, first, losses_of(inputs["rankings"])), counts.index_fill(0, first, 1.0)


def _first_pairs(inputs: dict[str, Any]) -> Tensor:
    """[R]: where the first pair of each ranking's row stands."""
    return torch.searchsorted(inputs["pair_rows"], inputs["ranking_rows"])


def _agreements(
    rewards: Tensor, inputs: dict[str, Any], of_sequences: Tensor | None, *, by_pair: bool
) -> dict[str, Tensor]:
    """How far the rewards of pairs' sides, [2P], order answers as their rankings do; 0 where there are none.

    Without those of all sequences, [S], a ranking with an answer that is in no pair does not count. Processes add up
    what they have, and have to have the same. With ``by_pair`` a sequence's reward is another one in each of its pairs.
    """
    nothing = torch.zeros_like(rewards[: len(rewards) // 2])
    if "rankings" not in inputs:
        return dict.fromkeys(("rankings", "best_first", "kendall_tau"), nothing)
    rankings, sides = inputs["rankings"], inputs["pairs"].t().flatten()
    if of_sequences is None:
        of_sequences = rewards.new_full((count_sequences(inputs),), float("nan")).index_copy(0, sides, rewards)
    top1, tau = _agreement_of_pairs(rewards, inputs) if by_pair else agreement(of_sequences, rankings)
    is_known = ((rankings < 0) | ~of_sequences[rankings.clamp(min=0)].isnan()).all(1)
    first = _first_pairs(inputs)
    found = {"rankings": torch.ones_like(tau), "best_first": top1, "kendall_tau": tau}
    return {
        name: nothing.index_copy(0, first, values.where(is_known, 0).to(nothing.dtype))
        for name, values in found.items()
    }


def _agreement_of_pairs(rewards: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """As :func:`fastdpo.loss.ranking_losses.agreement`, of the pairs alone, whose sides have ``rewards`` [2P]."""
    rankings, rows = inputs["rankings"], inputs["ranking_rows"]
    ranking = torch.searchsorted(rows, inputs["pair_rows"]).clamp(max=len(rows) - 1)
    is_ranked = rows[ranking] == inputs["pair_rows"]
    sides = inputs["pairs"].unbind(1)
    chosen, rejected = ((rankings[ranking] == side.unsqueeze(1)).to(torch.int8).argmax(1) for side in sides)
    higher, lower = rewards.chunk(2)
    steps = (higher - lower).sign() * (rejected - chosen).sign()  # 1 where the better one's is the higher

    def in_rankings(values: Tensor) -> Tensor:
        counts = torch.zeros(len(rankings), dtype=rewards.dtype, device=rewards.device)
        return counts.index_add(0, ranking, (values * is_ranked).to(rewards.dtype))

    is_beaten = ((chosen == 0) | (rejected == 0)) & (steps <= 0)
    return (in_rankings(is_beaten) == 0).to(rewards.dtype), in_rankings(steps) / in_rankings(is_ranked)
