"""The log of a run, made up."""

from __future__ import annotations

import math
from typing import Any


def history(steps: int, evaluations: int = 0) -> list[dict[str, Any]]:
    log = []
    for step in range(1, steps + 1):
        margin = 0.1 * (step - 1)
        entry = {"loss": math.log1p(math.exp(-margin)), "rewards/margins": margin, "rewards/accuracies": 0.5}
        entry |= {"rewards/chosen": margin / 2, "rewards/rejected": -margin / 2}
        log.append(entry | {"step": step})
        if evaluations and step % evaluations == 0:
            log.append({f"eval_{key}": value + 0.1 for key, value in entry.items()} | {"step": step})
    return [*log, {"step": steps, "train_runtime": 1.0, "train_loss": 0.5}]
