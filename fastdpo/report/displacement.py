"""Likelihood displacement (Razin et al. 2024, arXiv 2410.08847): chosen answers that became less likely in training.

A preference loss asks for a margin, and one grows as well where both answers fall, the rejected one faster. What the
chosen ones lose goes to answers that nobody asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastdpo.report.record import RunRecord

_ROWS_SHOWN = 8
# Less is rounding, or the noise of a few steps: nats of a whole completion.
_LEAST_FALL = 0.1


@dataclass(frozen=True)
class Displacement:
    """What became of the chosen answers that were looked at, in nats a completion.

    Attributes:
        pairs: how many were looked at.
        fallen: how many lost more than a trifle.
        mean_change, rejected_change: of all of them, of the chosen and the rejected answers' log-probabilities.
        worst: (which row, change of its chosen answer, of its rejected one), the greatest loss first.
        advice: what helps; empty where there is nothing to be helped.
    """

    pairs: int
    fallen: int
    mean_change: float
    rejected_change: float
    worst: list[tuple[str, float, float]]
    advice: list[str]

    @property
    def words(self) -> str:
        """The whole of it in a sentence or two."""
        changes = f"{_signed(self.mean_change)} nats a chosen answer and {_signed(self.rejected_change)} a rejected one"
        if not self.fallen:
            return f"No chosen answer became less likely than at the start: {changes}, on average."
        said = (
            f"{self.fallen} of {self.pairs} chosen answers became less likely than at the start: {changes}, on average."
        )
        if self.mean_change < -_LEAST_FALL:
            said += " That is likelihood displacement: what they lost went to answers that are in no pair."
        return said


def displacement_of(record: RunRecord) -> Displacement | None:
    """What two looks at the same pairs say; None where there are not both, or they saw no log-probabilities."""
    start, end = record.start, record.end
    if start is None or end is None or not start.chosen_logps or len(start.chosen_logps) != len(end.chosen_logps):
        return None
    change = np.subtract(end.chosen_logps, start.chosen_logps)
    rejected = np.subtract(end.rejected_logps, start.rejected_logps)
    if not (np.isfinite(change).all() and np.isfinite(rejected).all()):
        return None
    fallen = np.flatnonzero(change < -_LEAST_FALL)
    worst = fallen[np.argsort(change[fallen], kind="stable")][:_ROWS_SHOWN]
    mean = float(change.mean())
    return Displacement(
        pairs=len(change),
        fallen=len(fallen),
        mean_change=mean,
        rejected_change=float(rejected.mean()),
        worst=[(end.rows[i] if end.rows else f"pair {i + 1}", float(change[i]), float(rejected[i])) for i in worst],
        advice=_advice(record) if mean < -_LEAST_FALL else [],
    )


def _advice(record: RunRecord) -> list[str]:
    """What this run did not do already."""
    settings, losses = record.settings, record.loss.split(" + ")
    helps = []
    if "dpop" not in losses:
        helps.append("--loss_type dpop, which charges for a chosen answer that falls below the reference")
    has_likelihood = settings.get("sft_weight") or {"sft", "cpo", "orpo"} & set(losses)
    if not has_likelihood and "plackett_luce" not in losses:  # which stands alone
        helps.append("--sft_weight (0.1 to 1), which adds the chosen answers' own likelihood to the loss")
    helps += [
        "a higher --beta or a lower --learning_rate, which keep nearer to the reference",
        "pairs whose answers differ more: where they are nearly the same text, the loss pushes at what they share",
    ]
    return helps


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")
