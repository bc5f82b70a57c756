"""Standard output and error, on whatever they are: a terminal that obeys escapes, a pipe that closes, an ASCII locale.

Text from data, files and their names comes to the terminal by many ways: tables, errors, warnings, other libraries'
logs. It is made visible where it is put into a line (:func:`fastdpo.data.visible.visible`), and on standard error
again here, for whatever was forgotten.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import IO, Any

from fastdpo.data.visible import visible

# What progress bars and logs of libraries write themselves: colours, and a line up when several bars are drawn.
_STYLES = re.compile(r"(\x1b\[(?:[0-9]|[349][0-7]|39|22|24|1;3[0-7])?m)")
_MOVES = re.compile(r"[\r\n]*(?:\x1b\[A)*")
# A terminal that is gone says that its device has an error.
_GONE = frozenset((errno.EPIPE, errno.EIO, errno.ENXIO))


class SafeStream:
    """A standard stream that cannot end a run: where nobody reads any more, or the disk is full, lines are lost.

    Args:
        stream: ``sys.stdout`` or ``sys.stderr``.
        clean: make control characters visible; for a stream on which nothing is drawn but progress bars.
        goes_on: what to do when the reader has gone: go on without a word (a run, of which files are what counts), or
            end quietly.
    """

    def __init__(self, stream: IO[str], *, clean: bool, goes_on: bool) -> None:
        self._stream, self._clean, self._goes_on = stream, clean, goes_on
        with contextlib.suppress(AttributeError, ValueError, OSError):
            # Of an encoding that lacks a character, or of a name that is not UTF-8: its code.
            stream.reconfigure(errors="backslashreplace")  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As a stream's; the number of characters is that of ``text``."""
        with self._surviving():
            self._stream.write(_cleaned(text) if self._clean else text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        with self._surviving():
            self._stream.flush()

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _GONE:
                return  # a log on a full disk
            self._to_nowhere()
            if not self._goes_on:
                raise ReaderGoneError from None

    def _to_nowhere(self) -> None:
        """What is buffered, and what children write, would fail again."""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def open_what_is_closed() -> None:
    """Give a process that was started without a standard stream (``>&-``) one that leads nowhere.

    Python has None in its place; and the next file that is opened would get its number, and with it whatever a library
    prints.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, errors="backslashreplace", closefd=False))  # noqa: SIM115 (for good)


class ReaderGoneError(Exception):
    """Whoever read a command's output has closed it, as ``head`` does, and there is nothing else to do."""


def _cleaned(text: str) -> str:
    if _MOVES.fullmatch(text):
        return text
    parts = _STYLES.split(text)
    return "".join(part if i % 2 else _visible_but_returns(part) for i, part in enumerate(parts))


def _visible_but_returns(text: str) -> str:
    return "\r".join(map(visible, text.split("\r")))  # a bar begins its line anew


@contextlib.contextmanager
def safe_streams(*, goes_on: bool, for_good: bool = False) -> Iterator[None]:
    """Standard output and error are :class:`SafeStream` for the duration of the block.

    Args:
        goes_on: see :class:`SafeStream`; of standard output.
        for_good: they stay so after the block, for an interpreter that ends with it: it may have a traceback to print.

    Raises:
        ReaderGoneError: standard output was closed, and the command does not go on.
    """
    before = sys.stdout, sys.stderr
    sys.stdout = SafeStream(before[0], clean=False, goes_on=goes_on)
    sys.stderr = SafeStream(before[1], clean=True, goes_on=True)
    try:
        yield
        sys.stdout.flush()
    finally:
        if not for_good:
            sys.stdout, sys.stderr = before
