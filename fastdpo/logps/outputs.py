"""What ``token_logps`` returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenLogps:
    """Per-token results, each of the shape of ``targets``, 0 (False) where the target is ignored.

    Attributes:
        logps: log-probability of the target, in nats, never above 0; float32 (float64 for float64 inputs).
            The only differentiable field; the others are detached.
        entropy: -sum_j p_j log p_j, in nats. None unless asked for, as all that follow.
        log_sum_sq_probs: log sum_j p_j^2, the normaliser of WPO's weights (Zhou et al. 2024, arXiv 2406.11827, eq. 2).
        mean_logits: mean of the logits over the vocabulary.
        is_top1: whether no other logit is greater than the target's (bool).
    """

    logps: Tensor
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
