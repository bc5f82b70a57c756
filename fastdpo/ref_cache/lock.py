"""A file that one process holds: who holds it is written in it, and a dead process does not."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import psutil

logger = logging.getLogger(__name__)

# File systems without locks answer with one of these.
_NO_LOCKS = frozenset((errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL))


class HeldError(Exception):
    """Another process holds the file; the message is who, in words: ``process 17 on node3, since 10:15``."""


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold ``path`` for the duration of the block; its folder is made.

    The lock is ``flock``'s: the system lets go of it when the process is gone, however it went, and NFS knows it. Where
    a file system has none, what is written in the file has to do: it holds while its process is alive, which can be
    told on its own machine only; of another machine's it warns.

    Raises:
        HeldError: another process holds it.
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.closing(_taken(path)) as file:
        _held.add(file)
        _say_who(file)
        try:
            yield
        finally:
            _held.discard(file)
            if not file.closed:  # as it is in a forked child
                path.unlink(missing_ok=True)


_held: set[IO[str]] = set()


def _let_go_in_child() -> None:
    # A forked child that outlives its parent would hold what the parent held.
    while _held:
        _held.pop().close()


os.register_at_fork(after_in_child=_let_go_in_child)


def _taken(path: Path) -> IO[str]:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            _take(file, path)
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                return file
        except BaseException:
            file.close()
            raise
        file.close()  # who held it until now has deleted it: it is nobody's lock any more


def _take(file: IO[str], path: Path) -> None:
    file.seek(0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise HeldError(_words(_holder(file))) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _take_without_locks(_holder(file), path)


def _take_without_locks(holder: dict[str, Any], path: Path) -> None:
    if not holder:
        return
    if holder.get("host") != socket.gethostname():
        logger.warning(
            "%s names %s, and this file system has no locks by which to tell whether it still runs. If it does, stop "
            "this run.",
            path,
            _words(holder),
        )
    elif _is_alive(holder):
        raise HeldError(_words(holder))


def _is_alive(holder: dict[str, Any]) -> bool:
    try:
        return bool(psutil.Process(holder["process"]).create_time() == holder["created"])
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def _holder(file: IO[str]) -> dict[str, Any]:
    try:
        holder = json.loads(file.read())
    except ValueError:  # it is being written, or was not written to its end
        return {}
    return holder if isinstance(holder, dict) else {}


def _words(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('process')} on {holder.get('host')}, since {holder.get('since')}"


def _say_who(file: IO[str]) -> None:
    process = psutil.Process()
    since = datetime.fromtimestamp(process.create_time()).isoformat(" ", "minutes")
    who = {"process": process.pid, "host": socket.gethostname(), "since": since, "created": process.create_time()}
    with contextlib.suppress(OSError):  # it is held as well where there is no room to say by whom
        file.truncate(0)
        file.write(json.dumps(who) + "\n")
        file.flush()
