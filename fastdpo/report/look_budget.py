"""How long a look at the policy may take: a share of the run that it is about."""

from __future__ import annotations

import time
from collections.abc import Callable

# Of the run's time, for the looks before and after it together.
SHARE = 0.1
# Seconds of a look that nobody minds, however short the run.
LEAST_SECONDS = 2.0
# A training step costs at least so many times the scoring of its pairs: the backward pass alone is two forward passes,
# and scoring may have the reference's beside the policy's.
_STEP_OVER_SCORING = 2.0


class LookBudget:
    """Seconds for a look, from how fast its first pairs are scored.

    Half of them are for scoring pairs, half for completions.

    Args:
        pairs_of_run: how many pairs this process trains on until the run ends.
        clock: in seconds.
    """

    def __init__(self, pairs_of_run: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._pairs_of_run, self._clock = pairs_of_run, clock
        self._began, self._pairs = clock(), 0
        self._first: tuple[float, int] | None = None

    def count(self, pairs: int) -> None:
        """So many pairs more were scored, just now."""
        self._pairs += pairs
        if self._first is None:  # holds what is done once: compiling, filling caches
            self._first = (self._clock(), self._pairs)

    @property
    def elapsed(self) -> float:
        """Seconds since the look began."""
        return self._clock() - self._began

    @property
    def seconds_per_pair(self) -> float:
        """Of scoring; from the second batch on where there is one."""
        if self._first is None:
            raise ValueError("no pair was scored yet")
        at, pairs = self._first
        if self._pairs > pairs:
            return (self._clock() - at) / (self._pairs - pairs)
        return (at - self._began) / pairs

    @property
    def half(self) -> float:
        """Seconds for the pairs' rewards, and as many for the completions."""
        run = _STEP_OVER_SCORING * self.seconds_per_pair * self._pairs_of_run
        return max(LEAST_SECONDS, SHARE * run / 2) / 2

    def affordable(self, most: int) -> int:
        """How many pairs more, up to ``most``, can be scored in their half; no more at once than were scored before."""
        left = self.half - self.elapsed
        return max(0, min(most, self._pairs, int(left / max(self.seconds_per_pair, 1e-9))))


def pairs_of_run(max_steps: int, num_train_epochs: float, rows: int, pairs_per_step: int, processes: int) -> float:
    """How many pairs one of ``processes`` trains on; ``max_steps`` at most 0 for as many as the epochs have."""
    whole = max_steps * pairs_per_step if max_steps > 0 else num_train_epochs * rows
    return whole / processes
