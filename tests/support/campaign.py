"""Runs whose writes are counted, and one of which the disk is full for, or the process dies in the middle of.

Processes are forked from one that has imported everything, with ``disk_faults.c`` preloaded: see there.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from fastdpo.commands.cli import main
from fastdpo.ref_cache import build as ref_build

_CODES = {"count": 0, "full": 1, "kill": 2}
_SOURCE = Path(__file__).with_name("disk_faults.c")


@dataclass(frozen=True)
class Fault:
    """What happens at the ``count``-th write to files whose path has one of ``parts``; all files for none.

    ``what`` is "full" (that write and all after it fail for want of space), "kill" (half of it is written), "count"
    (nothing, and every write is traced), or "later" (killed after ``seconds``, wherever that is).
    """

    what: str
    count: int = 0
    parts: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """How a process ended: its exit code, negative for a signal; what it said; the files it was struck in."""

    code: int
    said: str
    struck: list[str]


class Arena:
    """Starts processes, in a folder of its own for what they leave beside their runs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        library = folder / "disk_faults.so"
        compiler = os.environ.get("CC", "cc")
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, _SOURCE, "-ldl"], check=True)
        self._library = str(library)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["campaign_server"])

    @contextmanager
    def started(self) -> Iterator[None]:
        """The server that processes are forked from; it is started by the first of them."""
        before = os.environ.get("LD_PRELOAD")
        os.environ["LD_PRELOAD"] = self._library
        try:
            yield
        finally:
            if before is None:
                del os.environ["LD_PRELOAD"]
            else:
                os.environ["LD_PRELOAD"] = before

    def run(self, words: Sequence[str], inside: Path, fault: Fault | None = None) -> Outcome:
        """``fastdpo *words``, of whose writes those below ``inside`` count."""
        self._count += 1
        log, trace = self._folder / f"{self._count}.log", self._folder / f"{self._count}.trace"
        process = self._context.Process(target=_run, args=(list(words), log, trace, self._library, inside, fault))
        process.start()
        process.join(timeout=600)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"fastdpo {' '.join(words)}: still running. {log.read_text()}")
        assert process.exitcode is not None
        struck = trace.read_text().splitlines() if trace.exists() else []
        outcome = Outcome(process.exitcode, log.read_text(errors="replace"), struck)
        for path in (log, trace):
            path.unlink(missing_ok=True)
        return outcome


def _run(words: list[str], log: Path, trace: Path, library: str, inside: Path, fault: Fault | None) -> None:
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    ref_build.PART_SECONDS = 0.0  # every batch of the reference cache is written
    if fault is not None and fault.what == "later":
        threading.Thread(target=_die_after, args=(fault.seconds,), daemon=True).start()
    elif fault is not None:
        faults = ctypes.CDLL(library)
        for part in (str(inside), *fault.parts):
            faults.mark(part.encode())
        traced = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        faults.arm(_CODES[fault.what], ctypes.c_long(fault.count), traced)
    sys.exit(main(words))


def _die_after(seconds: float) -> None:
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


# --------------------------------------------------------------------------------------------------------------------
# Damage
# --------------------------------------------------------------------------------------------------------------------

DAMAGES = ("truncated", "emptied", "flipped", "removed", "swapped")


def damage(path: Path, how: str, twin: Path | None, chance: random.Random) -> bool:
    """Damage a file; ``twin`` is one that it could be mistaken for. False where there is nothing to do."""
    content = path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "swapped":
        if twin is None or twin.read_bytes() == content:
            return False
        shutil.copyfile(twin, path)
    elif not content:
        return False
    elif how == "flipped":
        place = chance.randrange(len(content))
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :])
    else:
        path.write_bytes(b"" if how == "emptied" else content[: chance.randrange(1, max(2, len(content)))])
    return True
