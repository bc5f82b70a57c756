"""The oracle: the same results as the kernels' from full logits, slow and obvious.

Every test compares with it. Give it float64 inputs for float64 arithmetic; it computes in the dtype that it is given,
is differentiable by autograd throughout, and holds all N x V logits at once. The losses' own oracle, from these
log-probabilities, is ``fastdpo.loss.oracle``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdpo.logps.outputs import TokenLogps


def logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """[..., V]: z = softcap * tanh(logit_scale * (h.w + b) / softcap) / temperature; hidden [..., H], weight [V, H]."""
    z = logit_scale * F.linear(hidden, weight, bias)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> TokenLogps:
    """log p(target) and every extra output of [...] tokens, 0 (False) where the target is ignored."""
    z = logits(hidden, weight, bias, logit_scale=logit_scale, softcap=softcap, temperature=temperature)
    scored = targets != ignore_index
    log_probs = z.log_softmax(-1)
    probs = log_probs.exp()
    logps = log_probs.gather(-1, targets.where(scored, 0).unsqueeze(-1)).squeeze(-1)
    target_logit = z.gather(-1, targets.where(scored, 0).unsqueeze(-1)).squeeze(-1)
    return TokenLogps(
        logps=logps.where(scored, 0.0),
        entropy=-torch.xlogy(probs, probs).sum(-1).where(scored, 0.0).detach(),
        log_sum_sq_probs=(2 * log_probs).logsumexp(-1).where(scored, 0.0).detach(),
        mean_logits=z.mean(-1).where(scored, 0.0).detach(),
        is_top1=(z.amax(-1) <= target_logit) & scored,
    )
