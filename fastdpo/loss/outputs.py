"""What ``dpo_loss`` returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class DPOOutput:
    """The loss of a batch of B pairs and, detached, what trainers log.

    Attributes:
        loss: scalar, the mean over pairs (float32; float64 for float64 inputs).
        chosen_logps, rejected_logps: [B], the policy's log-probability of each completion, in nats, as the loss has it:
            a sum over tokens; weighted with ``ld_alpha``, a mean with ``average_log_prob``.
        chosen_rewards, rejected_rewards: [B], beta * (policy - reference) log-probability: the implicit reward
            (Rafailov et al. 2023, arXiv 2305.18290, eq. 5, up to the prompt's constant). Of ``simpo``, ``orpo`` and
            ``cpo``, which have no reference, beta * the policy's (per token with simpo and orpo).
        losses: [B], the loss of each pair. (Those that ``aot`` sorts belong to ranks, not to pairs.)
        chosen_tokens, rejected_tokens: [B] int64, how many targets were scored.
        weights: [B], WPO's weights of the pairs; None without ``use_weighting``.
        entropy, mean_logits, is_top1: [2B], the chosen completions first, means over each completion's tokens of the
            fields of :class:`fastdpo.TokenLogps` (is_top1: the share of tokens); None unless asked for.
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

    def metrics(self) -> dict[str, Tensor]:
        """The batch's means under the names that trainers log them by; scalars, detached.

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
                metrics[name] = (means[side] * tokens[side]).sum() / tokens[side].sum()
        return metrics
