"""beta-DPO in a run (Wu et al. 2024, arXiv 2407.08639): the whole batch's margin, and the threshold that it is held to.

M is the mean of beta (r_w - r_l) over all pairs of an optimiser step, on all processes, each counted by its weight. M_0
is the moving average of the steps before, from 0, which M is at the start: after each step M_0 := m M_0 + (1 - m) M,
with the paper's m of 0.9.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fastdpo.errors import InputError

BETA_FILE = "batch_beta.json"
_MOMENTUM = 0.9


class BatchBeta(TrainerCallback):
    """M of the batch that is computed, and M_0.

    Args:
        accelerator: the run's.
        threshold: M_0, where it stays the same; None for the moving average.
    """

    def __init__(self, accelerator: Accelerator, threshold: float | None = None) -> None:
        self._accelerator, self._moves = accelerator, threshold is None
        self.threshold = threshold or 0.0
        self._margin: Tensor | None = None

    def margin_of(self, margins: Tensor, weights: Tensor) -> Tensor:
        """[] M of a batch, from its margins here and what they count, [P] each; every process calls it together."""
        sums = torch.stack(((margins * weights).sum(), weights.sum()))
        total, count = self._accelerator.reduce(sums, reduction="sum")
        self._margin = total / count
        return self._margin

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> TrainerControl | None:
        if self._moves and self._margin is not None:
            self.threshold = _MOMENTUM * self.threshold + (1 - _MOMENTUM) * float(self._margin)
        return None

    def save(self, checkpoint: Path) -> None:
        """Write M_0 to a checkpoint."""
        (checkpoint / BETA_FILE).write_text(json.dumps({"threshold": self.threshold}) + "\n", encoding="utf-8")

    def load(self, checkpoint: Path) -> None:
        """Take M_0 from there, unless it is given.

        Raises:
            InputError: it is not there.
        """
        if not self._moves:
            return
        path = checkpoint / BETA_FILE
        try:
            self.threshold = float(json.loads(path.read_text(encoding="utf-8"))["threshold"])
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"{checkpoint} has no {BETA_FILE} that can be read: it is of a run of another loss. Start a new run "
                "from its weights, or give beta_dpo_threshold"
            ) from error
