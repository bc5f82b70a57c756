"""What models say of the same pairs, as arrays: log-probabilities, and the margins that are made of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# name -> what it is, as pages and files tell it.
MEASURES = {
    "reward": "β · log-ratio to the reference, of the chosen answer less the rejected one: what DPO trains",
    "likelihood": "log-probability of the chosen answer less the rejected one",
    "per_token": "the same of means over an answer's tokens",
}


@dataclass(frozen=True)
class PairPlaces:
    """Which pairs were scored.

    Attributes:
        rows: int64 [P], the row of the data set, as it was read.
        clusters: int64 [P], the prompt: equal where its tokens are.
    """

    rows: np.ndarray
    clusters: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class PairScores:
    """What one model says of P pairs, [P] each: sums over the scored tokens, in nats, and how many these are."""

    chosen_logps: np.ndarray
    rejected_logps: np.ndarray
    chosen_tokens: np.ndarray
    rejected_tokens: np.ndarray

    def at(self, places: np.ndarray) -> PairScores:
        """Of some of the pairs, in this order."""
        return PairScores(*(getattr(self, name)[places] for name in self.__dataclass_fields__))

    def is_finite(self) -> np.ndarray:
        """[P] bool."""
        finite: np.ndarray = np.isfinite(self.chosen_logps) & np.isfinite(self.rejected_logps)
        return finite


@dataclass(frozen=True)
class Evaluated:
    """One of the models that are compared.

    Attributes:
        label: what it is called.
        source: where it was loaded from.
        scores: what it says of the pairs.
        reference: what its reference says of them; None where it has none, or is the reference itself.
        reference_label: what that is called; empty for none.
    """

    label: str
    source: str
    scores: PairScores
    reference: PairScores | None = None
    reference_label: str = ""

    def margins(self, beta: float) -> dict[str, np.ndarray]:
        """Measure -> [P], above 0 where the model prefers the chosen answer."""
        own = self.scores
        found = {}
        if self.reference is not None:
            ratios = (
                own.chosen_logps - self.reference.chosen_logps - (own.rejected_logps - self.reference.rejected_logps)
            )
            found["reward"] = beta * ratios
        found["likelihood"] = own.chosen_logps - own.rejected_logps
        found["per_token"] = own.chosen_logps / own.chosen_tokens - own.rejected_logps / own.rejected_tokens
        return found


def credits_of(margins: np.ndarray) -> np.ndarray:
    """What a model gets for each pair: 1 where it prefers the chosen answer, ½ where it prefers neither, else 0."""
    credit: np.ndarray = np.where(margins > 0, 1.0, np.where(margins < 0, 0.0, 0.5))
    return credit
