"""Errors about what a person gave, and the exit codes that the command ends with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

DIVERGED = 1
BAD_INPUT = 2  # argparse's exit code for it, too
INTERRUPTED = 130  # what a shell reports after Ctrl-C
TERMINATED = 143  # and after SIGTERM
HUNG_UP = 129  # and after SIGHUP
READER_GONE = 141  # and after SIGPIPE
RANK_LOST = 75  # sysexits' EX_TEMPFAIL: nothing is wrong with what was given, and the same again may work


class UsageError(Exception):
    """Input that the user can put right; the message is one or two lines, printed without a traceback."""


class InputError(ValueError):
    """Files that cannot be used. The message says all there is to say: which one, what is wrong, what to do."""


class DivergedError(ArithmeticError):
    """A run came to numbers that are none. The message says where it began, and what is kept."""


class LostRankError(RuntimeError):
    """A process of a run that is several is gone. The message says which one, and what is kept."""


class Stopped(KeyboardInterrupt):
    """A signal other than Ctrl-C ended what ran. Whoever tidies up after Ctrl-C does so after it.

    Attributes:
        exit_code: what the command ends with.
    """

    def __init__(self, name: str, exit_code: int) -> None:
        super().__init__(name)
        self.exit_code = exit_code


@contextmanager
def bad_input(what: str = "") -> Iterator[None]:
    """Turn the errors that libraries raise about their input into UsageError, with ``what`` in front."""
    try:
        yield
    except InputError as error:
        raise UsageError(str(error)) from error
    except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        prefix = f"{what}: " if what else ""
        raise UsageError(f"{prefix}{lines[0]}\n  (FASTDPO_TRACEBACK=1 shows where this came from.)") from error
