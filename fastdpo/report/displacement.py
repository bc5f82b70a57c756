"""Likelihood displacement (Razin et al. 2024, arXiv 2410.08847): chosen answers that became less likely in training.

A preference loss asks for a margin, and one grows as well where both answers fall, the rejected one faster. What the
chosen ones lose goes to answers that nobody asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastdpo.report.record import RunRecord

_ROWS_SHOWN = 8
# Less is rounding, or the noise of a few steps: nats of a whole completion, and of a token where these are means.
_LEAST_FALL, _LEAST_FALL_OF_A_TOKEN = 0.1, 0.001


@dataclass(frozen=True)
class Displacement:
    """What became of the chosen answers that were looked at.

    Attributes:
        unit: of the changes, in words.
        is_per_token: they are of means over tokens.
        pairs: how many were looked at.
        fallen: how many lost more than a trifle.
        mean_change, rejected_change: of all of them, of the chosen and the rejected answers' log-probabilities.
        worst: (which row, change of its chosen answer, of its rejected one), the greatest loss first.
        advice: what helps; empty where there is nothing to be helped.
    """

    unit: str
    is_per_token: bool
    pairs: int
    fallen: int
    mean_change: float
    rejected_change: float
    worst: list[tuple[str, float, float]]
    advice: list[str]

    @property
    def words(self) -> str:
        """The whole of it in a sentence or two."""
        changes = (
            f"chosen answers by {self.signed(self.mean_change)} and rejected ones by "
            f"{self.signed(self.rejected_change)} {self.unit}, on average"
        )
        if not self.fallen:
            return f"No chosen answer became less likely than at the start ({changes})."
        said = f"{self.fallen} of {self.pairs} chosen answers became less likely than at the start ({changes})."
        if self.is_displacement:
            said += " That is likelihood displacement: what they lost went to answers that are in no pair."
        return said

    @property
    def is_displacement(self) -> bool:
        """Whether the chosen answers fell on average."""
        return self.mean_change < -_least_fall(self.is_per_token)

    def signed(self, change: float) -> str:
        """As it is written."""
        return f"{change:+.{4 if self.is_per_token else 2}f}".replace("-", "−")


def _least_fall(is_per_token: bool) -> float:
    return _LEAST_FALL_OF_A_TOKEN if is_per_token else _LEAST_FALL


def displacement_of(record: RunRecord) -> Displacement | None:
    """What two looks at the same pairs say; None where there are not both, or they saw no log-probabilities."""
    start, end = record.start, record.end
    if start is None or end is None or not start.chosen_logps or len(start.chosen_logps) != len(end.chosen_logps):
        return None
    change = np.subtract(end.chosen_logps, start.chosen_logps)
    rejected = np.subtract(end.rejected_logps, start.rejected_logps)
    if not (np.isfinite(change).all() and np.isfinite(rejected).all()):
        return None
    least = _least_fall(record.is_per_token)
    fallen = np.flatnonzero(change < -least)
    worst = fallen[np.argsort(change[fallen], kind="stable")][:_ROWS_SHOWN]
    mean = float(change.mean())
    return Displacement(
        unit=record.logps_unit,
        is_per_token=record.is_per_token,
        pairs=len(change),
        fallen=len(fallen),
        mean_change=mean,
        rejected_change=float(rejected.mean()),
        worst=[(end.rows[i] if end.rows else f"pair {i + 1}", float(change[i]), float(rejected[i])) for i in worst],
        advice=_advice(record) if mean < -least else [],
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
