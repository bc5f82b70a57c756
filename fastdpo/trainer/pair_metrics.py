"""The metrics that are logged: sums over pairs, and the means that they come to."""

from __future__ import annotations

from collections.abc import Callable

import torch
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
    "rewards/top1": ("best_first", "rankings"),
    "rewards/kendall_tau": ("kendall_tau", "rankings"),
}
# Those that not every run has.
ROUTER_METRICS = ("aux_loss",)
RANKING_METRICS = ("rewards/top1", "rewards/kendall_tau")


def metric_names() -> list[str]:
    """The names in the log, without a prefix."""
    return list(_METRICS)


class PairSums:
    """Sums over all pairs since the last time that they were taken."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}

    def add(self, per_pair: dict[str, Tensor]) -> None:
        """Those of one more batch; each [B]."""
        sums = {name: values.sum() for name, values in per_pair.items()}
        self._totals = {name: self._totals[name] + value for name, value in sums.items()} if self._totals else sums

    def take(self, over_processes: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """The sums so far, of all processes where ``over_processes`` adds theirs up; empty where there are none."""
        names, totals = list(self._totals), list(self._totals.values())
        self._totals = {}
        if not totals:
            return {}
        together = torch.stack(totals)
        return dict(zip(names, (over_processes(together) if over_processes else together).tolist(), strict=True))


def means_of(sums: dict[str, float]) -> dict[str, float]:
    """name in the log -> mean, of what there are sums of."""
    return {
        name: sums[over] / sums[weight] for name, (over, weight) in _METRICS.items() if over in sums and sums[weight]
    }
