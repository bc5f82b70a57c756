"""Phases on the screen: a bar where there is a terminal, a few lines where there is none."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

# In a log, a line for each of so many parts of a phase.
_PARTS = 4


class Bar:
    """Progress of one phase; call :meth:`advance` as it goes."""

    def __init__(self, console: Console, total: int, progress: Progress | None) -> None:
        self._console, self._total, self._progress = console, total, progress
        self._done = 0
        if progress is not None:
            self._task = progress.add_task("", total=total)

    def advance(self, count: int = 1, text: str = "") -> None:
        """``count`` more units are done; ``text`` says how it stands."""
        before, self._done = self._done, self._done + count
        if self._progress is not None:
            self._progress.update(self._task, completed=self._done, description=text)
        elif before * _PARTS // self._total < self._done * _PARTS // self._total:
            self._console.print(f"   {self._done:>6} of {self._total}  {text}".rstrip(), highlight=False)


class Phases:
    """Numbered phases, and how long each took.

    Args:
        console: where to print.
        count: how many phases there will be.

    Attributes:
        seconds: wall-clock seconds by phase name.
    """

    def __init__(self, console: Console, count: int) -> None:
        self.seconds: dict[str, float] = {}
        self._console, self._count = console, count

    @contextmanager
    def phase(self, name: str, title: str, total: int) -> Iterator[Bar]:
        """One phase of ``total`` units, shown as ``title`` and kept in ``seconds`` as ``name``."""
        start = time.perf_counter()
        self._console.print(f"\n[bold]{len(self.seconds) + 1}/{self._count}  {title}[/]", highlight=False)
        if self._console.is_terminal:
            columns = (BarColumn(), TextColumn("{task.completed}/{task.total}"), TextColumn("{task.description}"))
            with Progress("  ", *columns, TimeRemainingColumn(), console=self._console, transient=True) as progress:
                yield Bar(self._console, total, progress)
        else:
            yield Bar(self._console, total, None)
        self.seconds[name] = time.perf_counter() - start
        self._console.print(f"[dim]   {self.seconds[name]:.0f} s[/]", highlight=False)
