"""The optimiser of all networks that the arms with sampling train."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WARMUP = 10
_MAX_GRAD_NORM = 1.0


class Optimizer:
    """AdamW without weight decay, gradients clipped to norm 1, a warm-up of ten updates.

    With ``updates``, the learning rate then falls to zero over that many in all; without, it stays.
    """

    def __init__(self, model: nn.Module, learning_rate: float, updates: int | None = None) -> None:
        self._parameters = list(model.parameters())
        self._optimizer = torch.optim.AdamW(self._parameters, lr=learning_rate, weight_decay=0.0, fused=True)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimizer, _schedule(updates))

    def update(self, loss: Tensor) -> None:
        """One update against ``loss``, a scalar."""
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, _MAX_GRAD_NORM)
        self._optimizer.step()
        self._schedule.step()


def _schedule(updates: int | None):
    def factor(done: int) -> float:
        falling = 1.0 if updates is None else max(0.0, 1 - done / updates)
        return min(1.0, (done + 1) / WARMUP) * falling

    return factor
