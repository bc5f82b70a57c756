"""From sequences' sums to what ``dpo_loss`` returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastdpo.loss.outputs import DPOOutput
from fastdpo.loss.pair_losses import PairLosses
from fastdpo.loss.ranking_losses import RankingLosses, agreement
from fastdpo.loss.units import Units


def output_of(
    loss: Tensor | None,
    losses_of: PairLosses | RankingLosses,
    units: Units,
    sums: Tensor,
    extras: Mapping[str, Tensor],
    tokens: Tensor,
    outputs: Sequence[str],
    compute: torch.dtype,
) -> DPOOutput:
    """A batch's loss, and what trainers log.

    Args:
        loss: None where it is yet to be made from the sums.
        losses_of, units: the losses, and what they are of.
        sums: [S, C], the policy's log-probabilities of the sequences' segments.
        extras: sums over the sequences, [S], of token-wise outputs.
        tokens: [S] int64, the scored tokens of each sequence.
        outputs: which of ``extras`` were asked for.
        compute: the dtype of the fields.
    """
    losses = losses_of(sums, extras)
    if loss is None:
        loss = units.mean(losses)
    chosen_logps, rejected_logps = losses_of.logps(sums.detach()).to(compute).chunk(2)
    chosen_rewards, rejected_rewards = losses_of.rewards(sums)
    chosen_tokens, rejected_tokens = losses_of.of_both(tokens)
    weights = losses_of.weights(sums, extras)
    means = {name: (total / tokens.clamp(min=1)).to(compute) for name, total in extras.items() if name in outputs}
    of_rankings = {}
    if isinstance(losses_of, RankingLosses):
        agreed = agreement(losses_of.sequence_rewards(sums), losses_of.rankings)
        of_rankings = {name: x.to(compute) for name, x in zip(("top1", "kendall_tau"), agreed, strict=True)}
    sequences = torch.arange(units.sequences, device=tokens.device)
    return DPOOutput(
        loss=loss.to(compute),
        losses=losses.detach().to(compute),
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        chosen_rewards=chosen_rewards.to(compute),
        rejected_rewards=rejected_rewards.to(compute),
        chosen_tokens=chosen_tokens,
        rejected_tokens=rejected_tokens,
        weights=None if weights is None else weights.to(compute),
        pairs=None if units.members is None else torch.stack(losses_of.of_both(sequences), dim=1),
        **of_rankings,
        **means,
    )
