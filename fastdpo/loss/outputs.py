"""What ``dpo_loss`` returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DPOOutput:
    """The loss of a batch of B pairs and, detached, what trainers log.

    B is P where ``pairs`` were given. Where ``rankings`` were, it is R, and their best sequences are what is called
    chosen, their last ones what is called rejected.

    Attributes:
        loss: scalar, the mean over pairs, each counted by its weight (float32; float64 for float64 inputs).
        chosen_logps, rejected_logps: [B], the policy's log-probability of each completion, in nats, as the loss has it:
            a sum over tokens; weighted with ``ld_alpha``, a mean with ``average_log_prob``.
        chosen_rewards, rejected_rewards: [B], beta * (policy - reference) log-probability: the implicit reward
            (Rafailov et al. 2023, arXiv 2305.18290, eq. 5, up to the prompt's constant). Of ``simpo``, ``orpo`` and
            ``cpo``, which have no reference, beta * the policy's (per token with simpo and orpo).
        losses: [B], the loss of each pair (or ranking), not multiplied by its weight. (Those that ``aot`` sorts belong
            to ranks, not to pairs; with weights to the pair whose margin has the rank.)
        chosen_tokens, rejected_tokens: [B] int64, how many targets were scored.
        weights: [B], WPO's weights of the pairs; None without ``use_weighting``.
        entropy, mean_logits, is_top1: of each sequence as ``hidden`` has them (without ``pairs`` or ``rankings`` [2B],
            the chosen ones first, with them [S]), means over its tokens of the fields of
            :class:`fastdpo.TokenLogps` (is_top1: the share of tokens); None unless asked for.
        pairs: [B, 2] int64, where ``pairs`` or ``rankings`` were given: the sequences that are chosen and rejected.
        top1: [R], of rankings: 1 where the best sequence has the highest reward, else 0.
        kendall_tau: [R], of rankings: how far the rewards have their order, from -1 to 1 (Kendall 1938): the share of
            a ranking's pairs that they order as it does, less that of those that they order the other way.
    """

    loss: Tensor
    losses: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    weights: Tensor | None = None
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    pairs: Tensor | None = None
    top1: Tensor | None = None
    kendall_tau: Tensor | None = None

    def metrics(self) -> dict[str, Tensor]:
        """The batch's means over pairs under the names that trainers log them by; scalars, detached.

        Each pair counts as one, whatever its weight. Of rankings there are ``rewards/top1`` and ``rewards/kendall_tau``
        as well.

        Of what was asked for, ``entropy`` is a mean over all tokens, ``logits/chosen`` and ``logits/rejected`` over the
        tokens of one side, ``mean_token_accuracy`` over the chosen tokens, as in TRL.
        """
        metrics = {
            "rewards/chosen": self.chosen_rewards.mean(),
            "rewards/rejected": self.rejected_rewards.mean(),
            "rewards/accuracies": (self.chosen_rewards > self.rejected_rewards).to(self.losses.dtype).mean(),
            "rewards/margins": (self.chosen_rewards - self.rejected_rewards).mean(),
            "logps/chosen": self.chosen_logps.mean(),
            "logps/rejected": self.rejected_logps.mean(),
        }
        for name, values in (("rewards/top1", self.top1), ("rewards/kendall_tau", self.kendall_tau)):
            if values is not None:
                metrics[name] = values.mean()
        pairs = len(self.losses)
        tokens = torch.cat((self.chosen_tokens, self.rejected_tokens))
        chosen, rejected, both = slice(0, pairs), slice(pairs, 2 * pairs), slice(0, 2 * pairs)
        for name, means, side in (
            ("logits/chosen", self.mean_logits, chosen),
            ("logits/rejected", self.mean_logits, rejected),
            ("entropy", self.entropy, both),
            ("mean_token_accuracy", self.is_top1, chosen),
        ):
            if means is not None:
                if self.pairs is not None:
                    means = means[self.pairs.t().flatten()]
                metrics[name] = (means[side] * tokens[side]).sum() / tokens[side].sum()
        return metrics
