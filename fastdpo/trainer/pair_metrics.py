"""The metrics that are logged: sums over pairs, and the means that they come to."""

from __future__ import annotations

from torch import Tensor

# name in the log -> (what is summed over pairs, the sum that it is divided by)
_METRICS = {
    "rewards/chosen": ("chosen_reward", "pairs"),
    "rewards/rejected": ("rejected_reward", "pairs"),
    "rewards/accuracies": ("accuracy", "pairs"),
    "rewards/margins": ("margin", "pairs"),
    "logps/chosen": ("chosen_logp", "pairs"),
    "logps/rejected": ("rejected_logp", "pairs"),
    "logits/chosen": ("chosen_logits", "chosen_tokens"),
    "logits/rejected": ("rejected_logits", "rejected_tokens"),
    "entropy": ("entropy", "tokens"),
    "mean_token_accuracy": ("chosen_top1", "chosen_tokens"),
    "aux_loss": ("aux_loss", "pairs"),
}


def add_sums(total: dict[str, Tensor] | None, addend: dict[str, Tensor]) -> dict[str, Tensor]:
    """The sums so far, and those of one more batch."""
    return addend if total is None else {name: total[name] + value for name, value in addend.items()}


def means_of(sums: dict[str, float]) -> dict[str, float]:
    """name in the log -> mean, of what there are sums of."""
    return {
        name: sums[over] / sums[weight] for name, (over, weight) in _METRICS.items() if over in sums and sums[weight]
    }
