"""The loss of a batch of pairs, and what metrics are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.logps.wide import widened
from fastdpo.loss.options import LossOptions
from fastdpo.loss.pair_losses import PairLosses
from fastdpo.model.scoring import Scorer, in_pair_order, micro_batches
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

    Attributes:
        aux_loss_coef: as above. Where the model can only be looked at once it is sharded, set then.
    """

    def __init__(self, policy: Scorer, reference: Reference, options: LossOptions, aux_loss_coef: float) -> None:
        self._policy, self._reference = policy, reference
        self._options, self.aux_loss_coef = options, aux_loss_coef

    def __call__(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of each pair [P] float64, and what metrics are made of, each detached, [P] float64.

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
        out = self._policy.score(inputs, outputs, root=model, at_shorter=at_shorter, **kwargs).in_pairs()
        losses_of = PairLosses(self._options, out.lengths, ref_sums)
        losses = losses_of(out.sums, out.outputs)
        chosen_rewards, rejected_rewards = losses_of.rewards(out.sums)
        chosen, rejected = losses_of.logps(out.sums.detach()).chunk(2)
        chosen_tokens, rejected_tokens = out.tokens.chunk(2)
        chosen_logits, rejected_logits = out.outputs["mean_logits"].chunk(2)
        chosen_entropy, rejected_entropy = out.outputs["entropy"].chunk(2)
        sums = {
            "pairs": torch.ones_like(chosen),
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
        }
        if self.aux_loss_coef:
            losses = losses + self.aux_loss_coef * out.model_output.aux_loss
            sums["aux_loss"] = out.model_output.aux_loss.expand_as(losses)
        sums["loss"] = losses
        return losses, {name: widened(values.detach()) for name, values in sums.items()}
