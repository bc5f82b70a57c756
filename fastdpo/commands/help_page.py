"""What ``--help`` and ``--help_all`` say of a command with many flags, apart from the parser that knows it."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple


class FlagHelp(NamedTuple):
    """One flag: its name, how it is written (``--beta X``), and what it does, in a paragraph."""

    name: str
    usage: str
    text: str


@dataclass(frozen=True)
class HelpPage:
    """The words, which go to lines as wide as the terminal is when they are shown.

    Attributes:
        heading: the command, and what it does.
        sections: titles, and the flags under each that ``--help`` describes.
        others_title, others: the flags that ``--help`` names and ``--help_all`` describes.
        epilog: printed as it is.
    """

    heading: str
    sections: Sequence[tuple[str, Sequence[FlagHelp]]]
    others_title: str
    others: Sequence[FlagHelp]
    epilog: str

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> HelpPage:
        """What ``dataclasses.asdict`` made, after a way through JSON.

        Raises:
            TypeError, ValueError, KeyError: it is something else.
        """
        sections = [(str(title), [FlagHelp(*flag) for flag in flags]) for title, flags in values["sections"]]
        return cls(**{**values, "sections": sections, "others": [FlagHelp(*flag) for flag in values["others"]]})

    def render(self, everything: bool) -> str:
        """The text of ``--help``, or with ``everything`` that of ``--help_all``."""
        formatter = _Layout("")
        formatter.add_text(self.heading)
        more = [("training, less usual", self.others)] if everything else []
        for title, flags in [*self.sections, *more]:
            formatter.start_section(title)
            formatter.add_arguments([_entry(flag) for flag in flags])
            formatter.end_section()
        if not everything:
            formatter.start_section(self.others_title)
            formatter.add_text(", ".join(f"--{flag.name}" for flag in self.others))
            formatter.end_section()
        return f"{formatter.format_help()}\n{self.epilog}"


class _Layout(argparse.HelpFormatter):
    """argparse's columns, for words that are complete."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=min(shutil.get_terminal_size().columns, 110))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return str(action.metavar)

    def _expand_help(self, action: argparse.Action) -> str:
        return action.help or ""


def _entry(flag: FlagHelp) -> argparse.Action:
    return argparse.Action([f"--{flag.name}"], flag.name, metavar=flag.usage, help=flag.text)
