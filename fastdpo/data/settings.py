"""How rows are to be prepared: what the ids depend on beside the rows and the tokenizer."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field

SCORES = ("assistant", "last")
# Part of the key under which prepared rows are kept on disk; raised whenever the same rows come to other ids.
PREPARATION = 2


@dataclass(frozen=True)
class Preparation:
    """
    Attributes:
        score: which answers of a completion with several count: all of the assistant's (``assistant``), or the last.
        end_token: what is appended to answers after which the chat template writes no end of turn; None for nothing.
        template_date: the day that templates write; None where none is written.
    """

    score: str = "assistant"
    end_token: str | None = None
    template_date: datetime.date | None = None
    version: int = field(default=PREPARATION, init=False)

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(SCORES)}, got {self.score!r}.")

    @property
    def day(self) -> datetime.date:
        return self.template_date or datetime.date.min


def parse_date(text: str | None) -> datetime.date | None:
    """``2026-03-01`` as a date; None for today, whichever day that is.

    Raises:
        ValueError: it is no date.
    """
    try:
        return None if text is None else datetime.date.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"template_date is {text!r}; it should be a date such as 2026-03-01.") from error
