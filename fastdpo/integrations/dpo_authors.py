"""The functions of the DPO authors' code (github.com/eric-mitchell/direct-preference-optimization, trainers.py).

    from fastdpo.integrations.dpo_authors import _get_batch_logps, preference_loss

Their names, arguments and results. ``batch_logps`` is ``_get_batch_logps`` from hidden states and the output
embedding, for whoever wants to be rid of the logits; its results go into ``preference_loss`` as before.

``preference_loss`` is :func:`fastdpo.preference_loss`. With ``reference_free`` its rewards are the policy's alone,
where theirs still compare with the reference that the loss does not see; with ``ipo`` a ``label_smoothing`` raises,
where theirs ignores it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastdpo.logps import token_logps
from fastdpo.loss import preference_loss

__all__ = ["_get_batch_logps", "batch_logps", "preference_loss"]

IGNORE_INDEX = -100


def _get_batch_logps(logits: Tensor, labels: Tensor, average_log_prob: bool = False) -> Tensor:
    """Log-probabilities of labels from logits: [B], in nats, summed over each row.

    Computed in float32 (float64 for float64) whatever the logits are in; theirs in the logits' dtype.

    Args:
        logits: [B, T, V], as the model returns them.
        labels: [B, T] int64, not shifted: logits[:, t] predicts labels[:, t + 1]. -100 where nothing is to be scored.
        average_log_prob: the mean over the scored tokens in the place of the sum. Of a row that has none it is 0, as
            the sum is; theirs is NaN.

    Raises:
        ValueError: the shapes do not fit.
    """
    if logits.dim() != 3 or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"logits has shape {tuple(logits.shape)} and labels {tuple(labels.shape)}; they should be [B, T, V] and "
            "[B, T]"
        )
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    targets = _shifted(labels)
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORE_INDEX)
    return _per_row(-losses.view(targets.shape), targets, average_log_prob)


def batch_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    average_log_prob: bool = False,
    *,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """What :func:`_get_batch_logps` returns, from hidden states: [B] float32 (float64 for float64), without the logits.

    Differentiable once, in hidden, weight and bias.

    Args:
        hidden: [B, T, H], the model's last hidden states, as its output embedding gets them.
        weight: [V, H], the output embedding.
        labels, average_log_prob: as there.
        bias, logit_scale, softcap: as in :func:`fastdpo.token_logps`.

    Raises:
        TypeError, ValueError, IndexError: as :func:`fastdpo.token_logps`.
    """
    if hidden.dim() != 3 or labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and labels {tuple(labels.shape)}; they should be [B, T, H] and "
            "[B, T]"
        )
    targets = _shifted(labels)
    result = token_logps(
        hidden, weight, targets, bias, ignore_index=IGNORE_INDEX, logit_scale=logit_scale, softcap=softcap
    )
    return _per_row(result.logps, targets, average_log_prob)


def _shifted(labels: Tensor) -> Tensor:
    """[B, T]: what each position predicts, nothing at the last. So the logits or hidden states need no copy."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def _per_row(logps: Tensor, targets: Tensor, average_log_prob: bool) -> Tensor:
    """[B] sums or means over the scored tokens of [B, T], which are 0 elsewhere."""
    # In float64, as a sum of hundreds of nats loses in float32 what differences between rows are made of.
    sums = logps.double().sum(-1)
    if average_log_prob:
        sums = sums / (targets != IGNORE_INDEX).sum(-1).clamp(min=1)
    return sums.to(logps.dtype)
