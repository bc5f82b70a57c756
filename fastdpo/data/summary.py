"""What became of the rows of a dataset: counts by reason, token lengths, and the table that a person reads."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fastdpo.data.reasons import DROP_REASONS, NOTES, WARN_REASONS
from fastdpo.data.work import GroupWork, Work

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table


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
class GroupFacts:
    """What groups hold.

    Attributes:
        groups: how many.
        answers: of them, each once.
        pairs: of these answers.
        most_answers: of one group.
        weighted: whether pairs have weights.
        left_out: pairs that were not made or kept, by reason in words.
    """

    groups: int
    answers: int
    pairs: int
    most_answers: int
    weighted: bool
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass
class DataSummary:
    """What became of the rows.

    Attributes:
        rows_in: rows before.
        rows_kept: rows after; ``rows_in - rows_kept == sum(dropped.values())``.
        dropped: rows left out, by reason (the keys of ``DROP_REASONS``). A row counts under one reason.
        warned: rows kept but doubtful, by reason (the keys of ``WARN_REASONS``). A row may count under several.
        noted: sound rows in which something was put right, or is worth knowing, by reason (the keys of ``NOTES``).
        details: for some reasons, what they are about: names of fields, of tools, a date.
        truncated: kept rows that the collator will cut, for ``chosen`` (prompt + chosen) and ``rejected``.
        lengths: token counts before any cut, of the rows kept and of those dropped for their length, for ``prompt``,
            ``chosen``, ``rejected`` and ``longest`` (the prompt with the longer completion).
        first_rows: for each reason, the first few row numbers (from 0) of the input.
        max_length: the limit in force, or None.
        truncation_mode: which end the collator keeps.
        unused_columns: columns of the input that nothing was made of.
        work: what a step costs, of the rows kept; None where no row is.
        read_as: the format that the rows were read as, and what was left out before them; "" where that is not known.
        groups: what they hold, where rows are groups, of several answers to a prompt; None where they are pairs.
        with_images: kept rows that have images; such rows are not packed.
    """

    rows_in: int
    rows_kept: int
    max_length: int | None
    truncation_mode: str
    dropped: dict[str, int] = field(default_factory=dict)
    warned: dict[str, int] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)
    details: dict[str, list[str]] = field(default_factory=dict)
    truncated: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, LengthStats] = field(default_factory=dict)
    first_rows: dict[str, list[int]] = field(default_factory=dict)
    unused_columns: list[str] = field(default_factory=list)
    work: Work | GroupWork | None = None
    read_as: str = ""
    groups: GroupFacts | None = None
    with_images: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The same as plain numbers, strings, lists and dicts, for JSON."""
        return asdict(self)

    def doubts(self) -> list[str]:
        """A line for each reason for which rows were dropped, or should be looked at; empty for sound data."""
        dropped = [f"{self._counted(reason)} dropped: {self.words(reason)}" for reason in self.dropped]
        return dropped + [f"{self._counted(reason)}: {self.words(reason)}" for reason in self.warned]

    def words(self, reason: str) -> str:
        """A reason in words, with what it is about."""
        said = (DROP_REASONS | WARN_REASONS | NOTES)[reason]
        details = self.details.get(reason)
        return f"{said} ({', '.join(details)})" if details else said

    def _counted(self, reason: str) -> str:
        return f"{self._count(reason)} of {self.rows_in} rows ({self._where(reason)})"

    def _count(self, reason: str) -> int:
        return (self.dropped | self.warned | self.noted)[reason]

    def table(self) -> Group:
        """A rich renderable: ``rich.print(summary.table())``."""
        from rich.console import Group

        parts = [self._rows_table(), self._lengths_table()]
        if isinstance(self.work, GroupWork):
            return Group(*parts, _group_work_table(self.work))
        return Group(*parts, _work_table(self.work, packs=not self.with_images)) if self.work else Group(*parts)

    def _rows_table(self) -> Table:
        from rich.table import Table

        title = "Preference groups" if self.groups else "Preference pairs"
        table = Table(title=title, title_justify="left", title_style="bold", show_header=False)
        table.add_column("what")
        table.add_column("rows", justify="right")
        table.add_column("where", style="dim")
        if self.read_as:
            table.add_row("read as", "", self.read_as)
        table.add_row("rows in", str(self.rows_in), "")
        table.add_row("kept", str(self.rows_kept), "", style="bold")
        if self.groups:
            self._add_groups(table, self.groups)
        if self.with_images:
            table.add_row("  with images", str(self.with_images), "in padded rows, two a pair")
        for side, count in self.truncated.items():
            if count:
                cut = {"keep_start": "end", "keep_end": "beginning"}[self.truncation_mode]
                table.add_row(f"  prompt + {side} loses its {cut}", str(count), f"max_length {self.max_length}")
        for reason, count in self.dropped.items():
            table.add_row(f"dropped: {self.words(reason)}", str(count), self._where(reason), style="red")
        for reason, count in self.warned.items():
            table.add_row(f"kept, but: {self.words(reason)}", str(count), self._where(reason), style="yellow")
        for reason, count in self.noted.items():
            table.add_row(self.words(reason), str(count), self._where(reason), style="dim")
        if self.unused_columns:
            table.add_row("columns that are not used", str(len(self.unused_columns)), ", ".join(self.unused_columns))
        return table

    def _add_groups(self, table: Table, groups: GroupFacts) -> None:
        table.add_row("groups", str(groups.groups), "a batch's size counts groups")
        table.add_row("  answers, each once", str(groups.answers), f"up to {groups.most_answers} to a prompt")
        weighted = "each counts by its weight" if groups.weighted else "all count the same"
        table.add_row("  pairs of them", str(groups.pairs), weighted)
        for reason, count in groups.left_out.items():
            table.add_row(f"  pairs left out: {reason}", str(count), "", style="yellow")

    def _lengths_table(self) -> Table:
        from rich.table import Table

        table = Table(title="Tokens a row, before any cut", title_justify="left", title_style="bold")
        table.add_column("")
        for name in ("median", "mean", "p95", "max"):
            table.add_column(name, justify="right")
        labels = {"longest": "prompt + longest answer" if self.groups else "prompt + longer completion"}
        for name, stats in self.lengths.items():
            numbers = (stats.median, stats.mean, stats.p95, stats.max)
            table.add_row(labels.get(name, name), *(f"{number:,.0f}" for number in numbers))
        return table

    def _where(self, reason: str) -> str:
        rows = self.first_rows[reason]
        count = self._count(reason)
        return f"row {', '.join(map(str, rows))}{', …' if count > len(rows) else ''}"


def _group_work_table(work: GroupWork) -> Table:
    from rich.table import Table

    title = f"Tokens a step of {work.batch_size} groups ({work.pairs:,.0f} pairs)"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for name in ("padded, two rows a pair", "packed pairs, a prompt each", "packed, each answer once", "saving"):
        table.add_column(name, justify="right")
    for name, pairs, packed in (
        ("through the body", work.pairs_body, work.packed_body),
        ("through the head", work.pairs_head, work.packed_head),
    ):
        table.add_row(name, f"{work.padded:,.0f}", f"{pairs:,.0f}", f"{packed:,.0f}", f"{pairs / packed:.1f} x")
    return table


def _work_table(work: Work, packs: bool) -> Table:
    from rich.table import Table

    prompts = f" (prompts: {work.prompt_share:.0%} of packed ones)" if packs else ""
    title = f"Tokens a step of {work.batch_size} pairs{prompts}"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("")
    for name in ("padded, two rows a pair", *(("packed, each prompt once", "saving") if packs else ())):
        table.add_column(name, justify="right")
    if not packs:
        table.add_row("through the body", f"{work.padded:,.0f}")
        return table
    for name, packed in (("through the body", work.packed_body), ("through the head", work.packed_head)):
        table.add_row(name, f"{work.padded:,.0f}", f"{packed:,.0f}", f"{work.padded / packed:.1f} x")
    return table
