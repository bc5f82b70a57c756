"""What a benchmark is doing, while it does it."""

from __future__ import annotations

import time

from rich.console import Console


class Progress:
    """One line on stderr: overwritten on a terminal, one after another in a file."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, markup=False)
        self.status = self.console.status("")
        self.start = time.monotonic()

    def say(self, what: str) -> None:
        line = f"{time.monotonic() - self.start:6.0f} s  {what}"
        if self.console.is_terminal:
            self.status.update(line)
            self.status.start()
        else:
            self.console.print(line, soft_wrap=True)

    def stop(self) -> None:
        self.status.stop()
