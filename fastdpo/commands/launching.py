"""Several processes from one command: it becomes ``accelerate launch``, as ``trl dpo`` does."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from fastdpo.report.launcher import LAUNCHED

# Set by torchrun, and by accelerate launch also where it starts one process.
_BY_OTHERS = ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION")


class LaunchAskedError(Exception):
    """The flags ask for several processes, or for a launcher's settings, and this is the process of the command itself.

    Attributes:
        words: for ``accelerate launch``.
    """

    def __init__(self, words: Sequence[str]) -> None:
        super().__init__(" ".join(words))
        self.words = list(words)


def is_launched() -> bool:
    """Whether the command has started this process in its own place."""
    return LAUNCHED in os.environ


def is_launched_by_others() -> bool:
    """Whether a launcher that somebody else called has started it."""
    return not is_launched() and any(name in os.environ for name in _BY_OTHERS)


def typed_words(argv: Sequence[str]) -> list[str]:
    """The words that a person gave; DeepSpeed's launcher puts the rank before them, which it sets as LOCAL_RANK."""
    rank = os.environ.get("LOCAL_RANK")
    first = [f"{flag}={rank}" for flag in ("--local_rank", "--local-rank")]
    return list(argv[1:] if argv and argv[0] in first else argv)


def launch(asked: LaunchAskedError, command: str, argv: Sequence[str]) -> NoReturn:
    """Become ``accelerate launch``, whose processes run the same command: with its signals, and its exit status.

    Args:
        asked: what asks for it.
        command: of fastdpo's.
        argv: the words after it.
    """
    os.environ[LAUNCHED] = "1"
    words = ["-m", "accelerate.commands.launch", *asked.words, "-m", "fastdpo", command, *argv]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *words])
