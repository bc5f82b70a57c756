"""All that the report of a run is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastdpo.data.summary import DataSummary
from fastdpo.report.snapshot import Snapshot


@dataclass
class RunRecord:
    """A run, as its report tells it.

    Attributes:
        title: model and data, in a few words.
        log_history: of ``trainer.state``.
        step, max_steps: where the run stands, and where it was to end.
        first_step: where this process began; above 0 in a resumed run.
        seconds: from this process's first step to its last.
        whole_seconds: since this process began: reading, tokenising, loading and looking included.
        device: in words.
        batches: how they were laid out, in words.
        loss: what it is called.
        has_reference: whether rewards are measured against one.
        start, end: the policy before the first step, and now; None where it was not looked at.
        summaries: of the datasets.
        changed: setting -> (value, default), of those that are not at their default.
        settings: all settings.
        environment: versions and machine.
        command: that started the run.
        resume_command: that goes on from its last checkpoint; None where there is none.
        notes: what else a reader should know.
    """

    title: str
    log_history: list[dict[str, Any]]
    step: int
    max_steps: int
    device: str
    batches: str
    command: str
    loss: str = "sigmoid"
    has_reference: bool = True
    first_step: int = 0
    seconds: float | None = None
    whole_seconds: float | None = None
    start: Snapshot | None = None
    end: Snapshot | None = None
    summaries: dict[str, DataSummary] = field(default_factory=dict)
    changed: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    resume_command: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def is_per_token(self) -> bool:
        """Whether log-probabilities are means over tokens, as the loss has them (``average_log_prob``)."""
        return bool(self.settings.get("average_log_prob"))

    @property
    def logps_unit(self) -> str:
        """What log-probabilities are in, as the loss has them."""
        if self.is_per_token:
            return "nats a token"
        weight = self.settings.get("ld_alpha")
        if weight is None or weight == 1:
            return "nats a completion"
        return f"nats a completion, tokens beyond the shorter answer's length × {weight:g}"
