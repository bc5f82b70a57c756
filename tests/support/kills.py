"""Runs of the command line that die as a machine does: no handler runs, nothing is flushed."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import processes
import torch
from transformers import TrainerState

from fastdpo.commands import train as train_command
from fastdpo.commands.cli import main
from fastdpo.ref_cache import build as ref_build
from fastdpo.ref_cache import durable
from fastdpo.trainer import DPOTrainer

# What a run does whenever it writes a checkpoint, in this order, and the file that it leaves.
CHECKPOINT_WRITERS = {
    "weights": (DPOTrainer, "save_model", "model.safetensors"),
    "optimizer": (DPOTrainer, "_save_optimizer_and_scheduler", "optimizer.pt"),
    "rng": (DPOTrainer, "_save_rng_state", "rng_state.pth"),
    "state": (TrainerState, "save_to_json", "trainer_state.json"),
}


@dataclass(frozen=True)
class Moment:
    """When to die: the ``count``-th time that ``what`` happens in a process.

    ``what`` is "step" (an optimiser step ends), "cache" (half of a file of the reference cache is written), or one of
    ``CHECKPOINT_WRITERS`` (half of that file is).
    """

    what: str
    count: int


def run_process(words: list[str], log: Path, moment: Moment | None = None) -> int:
    """The exit code of ``fastdpo *words``, negative for a signal; its output goes to the file ``log``."""
    return _exit_codes(words, [(log, moment, {})], nullcontext)[0]


def run_ranks(
    words: list[str],
    logs: list[Path],
    moments: dict[int, Moment] | None = None,
    launch: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> list[int]:
    """The same of a process for each of ``logs``, which train together; ``moments`` are by rank.

    ``launch``, a function of some module: what else a launcher sets, see :mod:`ranks`.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    together = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(len(logs))}
    each = [
        (log, (moments or {}).get(rank), together | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, log in enumerate(logs)
    ]
    return _exit_codes([*words, "--ddp_backend", "gloo"], each, launch)


def _exit_codes(
    words: list[str],
    each: list[tuple[Path, Moment | None, dict[str, str]]],
    launch: Callable[[], AbstractContextManager[None]],
) -> list[int]:
    ranks = [
        processes.forking().Process(target=_run, args=(processes.here(**environment), words, log, moment, launch))
        for log, moment, environment in each
    ]
    for process in ranks:
        process.start()
    until = time.monotonic() + 300
    for process in ranks:
        process.join(timeout=max(until - time.monotonic(), 0))
    alive = [process for process in ranks if process.is_alive()]
    for process in alive:
        process.kill()
    if alive:
        said = "".join(log.read_text() for log, *_ in each if log.exists())
        raise TimeoutError(f"fastdpo {' '.join(words)}: still running. {said}")
    return [process.exitcode for process in ranks]


def _run(
    here: processes.Here,
    words: list[str],
    log: Path,
    moment: Moment | None,
    launch: Callable[[], AbstractContextManager[None]],
) -> None:
    processes.take_over(here)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    ref_build.PART_SECONDS = 0.0  # every batch of the reference cache is written
    if moment is not None:
        _arm(moment)
    with launch():
        sys.exit(main(words))


def _arm(moment: Moment) -> None:
    if moment.what == "step":
        owner, name = train_command.GentleStop, "on_step_end"
    elif moment.what == "cache":
        owner, name = durable, "_write"
    else:
        owner, name, file = CHECKPOINT_WRITERS[moment.what]
    original, left = getattr(owner, name), [moment.count]

    def dying(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] > 0:
            return original(*args, **kwargs)
        if moment.what == "cache":
            path, content = args
            path.with_name(f"{durable.UNFINISHED}{path.name}").write_bytes(content[: len(content) // 2])
        elif moment.what in CHECKPOINT_WRITERS:
            original(*args, **kwargs)
            folder = Path(args[1])  # after self: a folder, or a file in it
            torn = (folder if folder.is_dir() else folder.parent) / file
            if not torn.exists():  # one a rank
                torn = torn.with_stem(f"{torn.stem}_{os.environ['RANK']}")
            os.truncate(torn, torn.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, dying)
