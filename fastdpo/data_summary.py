"""What became of the rows of a dataset: counts by reason, token lengths, and the table that a person reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

DROP_REASONS = {
    "missing_value": "a field is null or absent",
    "empty_completion": "chosen or rejected is empty",
    "no_prompt": "no shared leading message to be the prompt",
    "prompt_too_long": "the prompt alone fills max_length",
}
DROP_REMEDIES = {
    "missing_value": "fill in or remove the rows whose prompt, chosen or rejected is null",
    "empty_completion": "check that chosen and rejected hold the answers, and that the columns are the right ones",
    "no_prompt": "give the prompt in a column of its own, or begin chosen and rejected with the same messages",
    "prompt_too_long": "raise max_length (--max_length), or shorten the prompts",
}
WARN_REASONS = {
    "identical": "chosen and rejected are identical",
    "identical_after_truncation": "chosen and rejected are identical once cut",
    "prompt_shortened": "the end of the prompt is left out",
    "prompt_repeated": "chosen and rejected repeat the prompt",
}
WARN_EXPLANATIONS = {
    "identical": "such a pair says nothing about preference",
    "identical_after_truncation": "they differ only beyond max_length; a larger one would tell them apart",
    "prompt_shortened": "its last tokens are others when a completion follows, and the context ends before them; "
    "end the prompt where a token ends, or use a chat template that renders it alike in both cases",
    "prompt_repeated": "they begin with the messages of the prompt column, which the model will read twice",
}


@dataclass
class LengthStats:
    """Token counts over rows."""

    median: float
    mean: float
    p95: float
    max: int

    @classmethod
    def of(cls, lengths: np.ndarray) -> LengthStats:
        return cls(
            median=float(np.median(lengths)),
            mean=float(np.mean(lengths)),
            p95=float(np.percentile(lengths, 95)),
            max=int(np.max(lengths)),
        )


@dataclass
class DataSummary:
    """What became of the rows.

    Attributes:
        rows_in: rows before.
        rows_kept: rows after; ``rows_in - rows_kept == sum(dropped.values())``.
        dropped: rows left out, by reason (the keys of ``DROP_REASONS``). A row counts under one reason.
        warned: rows kept but doubtful, by reason (the keys of ``WARN_REASONS``). A row may count under several.
        truncated: kept rows that the collator will cut, for ``chosen`` (prompt + chosen) and ``rejected``.
        lengths: token counts before any cut, of the rows kept and of those dropped for their length, for ``prompt``,
            ``chosen``, ``rejected`` and ``longest`` (the prompt with the longer completion).
        first_rows: for each reason, the first few row numbers (from 0) of the input.
        max_length: the limit in force, or None.
        truncation_mode: which end the collator keeps.
    """

    rows_in: int
    rows_kept: int
    max_length: int | None
    truncation_mode: str
    dropped: dict[str, int] = field(default_factory=dict)
    warned: dict[str, int] = field(default_factory=dict)
    truncated: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, LengthStats] = field(default_factory=dict)
    first_rows: dict[str, list[int]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain numbers, strings, lists and dicts, for JSON."""
        return asdict(self)

    def table(self) -> Group:
        """A rich renderable: ``rich.print(summary.table())``."""
        from rich.console import Group

        return Group(self._rows_table(), self._lengths_table())

    def _rows_table(self) -> Table:
        from rich.table import Table

        table = Table(title="Preference pairs", title_justify="left", title_style="bold", show_header=False)
        table.add_column("what")
        table.add_column("rows", justify="right")
        table.add_column("where", style="dim")
        table.add_row("rows in", str(self.rows_in), "")
        table.add_row("kept", str(self.rows_kept), "", style="bold")
        for side, count in self.truncated.items():
            if count:
                cut = {"keep_start": "end", "keep_end": "beginning"}[self.truncation_mode]
                table.add_row(f"  prompt + {side} loses its {cut}", str(count), f"max_length {self.max_length}")
        for reason, count in self.dropped.items():
            table.add_row(f"dropped: {DROP_REASONS[reason]}", str(count), self._where(reason), style="red")
        for reason, count in self.warned.items():
            table.add_row(f"kept, but: {WARN_REASONS[reason]}", str(count), self._where(reason), style="yellow")
        return table

    def _lengths_table(self) -> Table:
        from rich.table import Table

        table = Table(title="Tokens a row, before any cut", title_justify="left", title_style="bold")
        table.add_column("")
        for name in ("median", "mean", "p95", "max"):
            table.add_column(name, justify="right")
        labels = {"longest": "prompt + longer completion"}
        for name, stats in self.lengths.items():
            numbers = (stats.median, stats.mean, stats.p95, stats.max)
            table.add_row(labels.get(name, name), *(f"{number:,.0f}" for number in numbers))
        return table

    def _where(self, reason: str) -> str:
        rows = self.first_rows[reason]
        count = self.dropped.get(reason) or self.warned[reason]
        return f"row {', '.join(map(str, rows))}{', …' if count > len(rows) else ''}"
