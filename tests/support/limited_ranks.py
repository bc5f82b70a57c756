"""Runs named pieces of work on several gloo ranks, each within a time limit: what hangs is stopped, and named.

The processes are made once and work through the list; a piece that raises or hangs costs new ones for those after it.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from processes import Here, forking, here, take_over

_POLL, _GRACE = 0.02, 20.0  # seconds; the latter for a rank to import, and to say what a broken collective was


@dataclass(frozen=True)
class Outcome:
    """What came of a piece of work on one rank.

    Attributes:
        value: what it returned.
        error: its traceback; or that there was no answer within the limit. None where it returned.
    """

    value: Any = None
    error: str | None = None


def run_limited(
    work: Callable[[str], Any], names: Sequence[str], *, ranks: int, limit: float, folder: Path
) -> dict[str, list[Outcome]]:
    """name -> each rank's outcome of ``work(name)``, a function of some module, in the default process group.

    Args:
        work: what all ranks do at a time, for one name.
        names: in their order.
        ranks: how many processes.
        limit: seconds for each name.
        folder: empty, for what the processes tell each other.
    """
    found: dict[str, list[Outcome]] = {}
    left = list(names)
    for attempt in range(len(names) + 1):
        if not left:
            break
        place = folder / str(attempt)
        place.mkdir(parents=True)
        found |= _attempt(work, left, ranks, limit, place)
        left = [name for name in left if name not in found]
    assert not left
    return found


def _attempt(
    work: Callable[[str], Any], names: list[str], ranks: int, limit: float, place: Path
) -> dict[str, list[Outcome]]:
    """Outcomes up to the first that is not good, or of all."""
    context = forking()
    shared = (here(), work, names, ranks, limit, str(place))
    processes = [context.Process(target=_on_rank, args=(rank, *shared), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    found: dict[str, list[Outcome]] = {}
    grace = 3 * _GRACE  # the first name's, with the imports
    try:
        for number, name in enumerate(names):
            files = [place / f"{number}.{rank}.pt" for rank in range(ranks)]
            _await(files, processes, limit + grace)
            grace = _GRACE
            silent = Outcome(error=f"no answer within {limit:g} s, or the process ended")
            found[name] = [torch.load(file, weights_only=False) if file.exists() else silent for file in files]
            if any(outcome.error for outcome in found[name]):
                break
    finally:
        for process in processes:
            process.join(timeout=0 if found and any(o.error for o in found[name]) else _GRACE)
            process.kill()
            process.join()
    return found


def _await(files: list[Path], processes: list[Any], seconds: float) -> None:
    """Until all files are there, or a process ended without its own, or the time is over."""
    end = time.monotonic() + seconds
    while not all(file.exists() for file in files) and time.monotonic() < end:
        ended = [not process.is_alive() for process in processes]
        if any(is_over and not file.exists() for is_over, file in zip(ended, files, strict=True)):
            end = min(end, time.monotonic() + _GRACE)  # the others' collectives break, too
        if all(ended):
            break
        time.sleep(_POLL)


def _on_rank(
    rank: int, there: Here, work: Callable[[str], Any], names: list[str], ranks: int, limit: float, place: str
) -> None:
    take_over(there)
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")  # asked for, and not used: the group is there
    timeout = timedelta(seconds=limit)
    dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=ranks, timeout=timeout)
    for number, name in enumerate(names):
        try:
            outcome = Outcome(work(name))
        except Exception:
            outcome = Outcome(error=traceback.format_exc())
        file = Path(place) / f"{number}.{rank}.pt"
        torch.save(outcome, file.with_suffix(".part"))
        file.with_suffix(".part").rename(file)
        if outcome.error:
            os._exit(1)  # a destructor may wait for the others
    dist.barrier()
    os._exit(0)
