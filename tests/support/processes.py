"""Processes of their own for tests, without each of them waiting for the same imports.

They are forked from one that has imported what most of them need and has run nothing: multiprocessing's server, one for
all tests of a worker. How an interpreter starts and ends, and what an environment variable decides when a library is
loaded, is tested in processes that are started as users start them.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

# With a command come torch, transformers, datasets and peft; the others are imported late, in every process.
PRELOADED = [
    "fastdpo.commands.train",
    "fastdpo.commands.cache_ref",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "torch.distributed.fsdp",
    "torch.testing",
]
# What `python -m fastdpo` runs.
MAIN = "import sys; from fastdpo.commands.cli import main; sys.exit(main())"
_AT_FIRST = dict(os.environ)  # before any test has changed it


def forking() -> Any:
    """multiprocessing's, with the server running; whatever a test's environment is, the server's is the suite's."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, _AT_FIRST, clear=True):
        forkserver.ensure_running()
    return context


class Here(NamedTuple):
    """What of this process may differ from what the server's was at the start."""

    environment: dict[str, str]
    folder: str


def here(**env: str) -> Here:
    return Here({**os.environ, **env}, os.getcwd())


def take_over(there: Here) -> None:
    """The first thing that a forked process does."""
    gc.freeze()  # as tests/conftest.py does
    os.environ.clear()
    os.environ.update(there.environment)
    os.chdir(there.folder)
    if (cache := there.environment.get("HF_DATASETS_CACHE")) is not None:  # which datasets has read before
        sys.modules["datasets"].config.HF_DATASETS_CACHE = Path(cache)


def spawn(work: Callable[..., Any], args: tuple[Any, ...], nprocs: int) -> None:
    """``torch.multiprocessing.spawn``."""
    forking()
    torch.multiprocessing.start_processes(_work, (here(), work, args), nprocs, start_method="forkserver")


def _work(rank: int, there: Here, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    take_over(there)
    work(rank, *args)


class Program:
    """A running program, whose output goes to files."""

    def __init__(self, words: list[str], process: BaseProcess, folder: tempfile.TemporaryDirectory[str]) -> None:
        self.words, self.process, self.folder = words, process, folder

    def wait_for(self, line: str, timeout: float = 300) -> None:
        """Until it has printed the line."""
        end = time.monotonic() + timeout
        while line not in Path(self.folder.name, "out").read_text().splitlines():
            assert self.process.is_alive() and time.monotonic() < end, self.wait(timeout=1)
            time.sleep(0.02)

    def kill(self) -> None:
        """As a machine does."""
        self.process.kill()
        self.wait()

    def wait(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        self.process.join(timeout)
        out, err = (Path(self.folder.name, name).read_text() for name in ("out", "err"))
        if self.process.is_alive():
            self.process.kill()
            raise subprocess.TimeoutExpired(self.words, timeout, out, err)
        self.folder.cleanup()
        return subprocess.CompletedProcess(self.words, self.process.exitcode, out, err)


def start(code: str, *words: str, **env: str) -> Program:
    """Begins what ``python -c code *words`` does, with these variables besides this process's."""
    folder = tempfile.TemporaryDirectory()
    for name in ("out", "err"):
        Path(folder.name, name).touch()
    process = forking().Process(target=_execute, args=(here(**env), folder.name, code, words))
    process.start()
    return Program(["-c", code, *words], process, folder)


def run(code: str, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Does what ``python -c code *words`` does; in one thread for every core, or as many as OMP_NUM_THREADS says."""
    return start(code, *words, **env).wait()


def _execute(there: Here, folder: str, code: str, words: tuple[str, ...]) -> None:
    take_over(there)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{folder}/{name}", os.O_WRONLY)
        os.dup2(file, number)
        os.close(file)
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)  # what the imports have freed would be used again, and not be seen where memory is measured
    if (threshold := os.environ.get("MALLOC_MMAP_THRESHOLD_")) is not None:
        libc.mallopt(-3, int(threshold))  # M_MMAP_THRESHOLD, of which the variable is read when a process starts
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1))
    sys.argv = ["-c", *words]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
