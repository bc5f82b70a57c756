"""The policy at one moment of a run, on rows that stay the same: implicit rewards, and a few completions."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

from fastdpo.trainer.json_files import read_sealed, write_sealed


@dataclass(frozen=True)
class SnapshotSize:
    """How much is looked at; 0 for nothing of a kind, None for as much as the run's length pays for.

    Attributes:
        pairs: rows to compute the implicit rewards of; None for at most 64.
        samples: prompts to complete, greedily; None for at most 4.
        max_new_tokens: where completions are cut; None for 64, or earlier.
    """

    pairs: int | None = None
    samples: int | None = None
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class Sample:
    """A prompt, the two answers of the data, and the policy's own (``ended``: not cut at the length limit)."""

    prompt: str
    chosen: str
    rejected: str
    completion: str
    ended: bool


@dataclass(frozen=True)
class Snapshot:
    """What was seen.

    Attributes:
        key: of the rows and sizes; snapshots of the same key can be compared.
        step: the optimiser step after which it was taken.
        rows_of: the dataset the rows are of, in words.
        chosen_rewards, rejected_rewards: implicit rewards, one a row.
        chosen_logps, rejected_logps: the policy's log-probabilities, one a row, in nats, as the loss has them: of whole
            completions, or means over their tokens, or weighted.
        rows: which rows these are, in words.
        samples: prompts with completions.
        no_rewards, no_samples: why there are none; empty where there are some.
        max_new_tokens: where the completions were cut.
        seconds: that looking took.
    """

    key: str
    step: int
    rows_of: str
    chosen_rewards: list[float] = field(default_factory=list)
    rejected_rewards: list[float] = field(default_factory=list)
    chosen_logps: list[float] = field(default_factory=list)
    rejected_logps: list[float] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    no_rewards: str = ""
    no_samples: str = ""
    max_new_tokens: int = 0
    seconds: float = 0.0

    @property
    def margins(self) -> list[float]:
        """Chosen minus rejected reward, one a row."""
        return [c - r for c, r in zip(self.chosen_rewards, self.rejected_rewards, strict=True)]

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        write_sealed(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> Snapshot:
        """What :meth:`save` wrote.

        Raises:
            ValueError, TypeError, KeyError: it is not there, or is something else.
        """
        values = read_sealed(path)
        if values is None:
            raise ValueError(f"{path} is not what was written")
        return cls(**{**values, "samples": [Sample(**sample) for sample in values["samples"]]})
