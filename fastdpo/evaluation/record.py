"""All that the page and the file of an evaluation are made of, and the file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastdpo.evaluation.run import Evaluation, JudgedContest
from fastdpo.evaluation.scores import MEASURES, Evaluated
from fastdpo.evaluation.statistics import Resampling
from fastdpo.ref_cache.durable import write_json

FORMAT = 1


@dataclass(frozen=True)
class EvaluationRecord:
    """An evaluation, as it is told.

    Attributes:
        title: models and data, in a few words.
        found: what was found.
        beta: of the rewards.
        how: how intervals were made.
        judge: who judged, by name and address; None for nobody.
        device: in words.
        seconds: that it took.
        command: that started it.
        environment: versions and machine.
    """

    title: str
    found: Evaluation
    beta: float
    how: Resampling
    device: str
    seconds: float
    command: str
    judge: dict[str, Any] | None = None
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def main_measure(self) -> str:
        """What is looked at first: rewards, where all models but a reference have them."""
        have = ["reward" in figures.accuracy for figures in self.found.figures.slices[0].models]
        return "reward" if any(have) else "likelihood"


def write_results(record: EvaluationRecord, path: Path) -> None:
    """All figures, and what each model says of each pair, as JSON."""
    found = record.found
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        path,
        {
            "format": FORMAT,
            "what": "an evaluation by fastdpo eval: shares between 0 and 1, log-probabilities in nats",
            "title": record.title,
            "command": record.command,
            "models": [{"name": model.label, "reference": model.reference_label or None} for model in found.models],
            "beta": record.beta,
            "measures": MEASURES,
            "intervals": asdict(record.how) | {"kind": "bootstrap over prompts, expanded percentiles"},
            "slices": [asdict(part) for part in found.figures.slices],
            "length_control": [asdict(each) for each in found.figures.length_control],
            "judge": None if record.judge is None else record.judge | {"contests": list(map(_contest, found.judged))},
            "pairs": {
                "row": found.places.rows.tolist(),
                "prompt": found.places.clusters.tolist(),
                "models": [_pairs_of(model) for model in found.models],
            },
            "notes": found.notes,
            "layouts": found.layouts,
            "seconds": round(record.seconds, 1),
            "environment": record.environment,
        },
    )


def _pairs_of(model: Evaluated) -> dict[str, Any]:
    found = {"name": model.label} | {name: values.tolist() for name, values in vars(model.scores).items()}
    if model.reference is not None:
        found |= {
            "reference_chosen_logps": model.reference.chosen_logps.tolist(),
            "reference_rejected_logps": model.reference.rejected_logps.tolist(),
        }
    return found


def _contest(judged: JudgedContest) -> dict[str, Any]:
    verdicts = judged.verdicts
    rows = zip(judged.contests, verdicts.first_read, verdicts.second_read, strict=True)
    return asdict(judged.figures) | {
        "answers": [
            {
                **asdict(contest),
                "first_gets_read_first": a,
                "first_gets_read_second": b,
                "refused": verdicts.refused.get(number),
            }
            for number, (contest, a, b) in enumerate(rows)
        ]
    }
