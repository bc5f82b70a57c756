"""A process of a run that is gone, told by those that wait for it: which one, and what is kept.

What a collective says then (a connection was closed, a socket was reset) names no process. So the processes tell each
other at the start who they are, and the others look who is still there when a collective fails. Of a process on another
machine that cannot be told; the machine can.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from fastdpo.errors import TERMINATED, LostRankError, Stopped
from fastdpo.logps.out_of_memory import is_out_of_memory
from fastdpo.trainer.checkpoints import find_checkpoints
from fastdpo.trainer.config import DPOConfig

# A process's connections are closed before the system says that it is gone.
_PATIENCE = 5.0
# What the back ends of torch.distributed say of a connection, in any of their versions.
_OF_CONNECTIONS = ("connection", "broken pipe", "socket", "peer", "remote process", "nccl")


@dataclass(frozen=True)
class Rank:
    """A process of a run.

    Attributes:
        rank: its number.
        host: its machine's name.
        pid, created: the process there, and when it began, in seconds since 1970; numbers of processes come again.
    """

    rank: int
    host: str
    pid: int
    created: float

    @classmethod
    def this(cls) -> Rank:
        process = psutil.Process()
        return cls(dist.get_rank(), socket.gethostname(), process.pid, process.create_time())

    def is_there(self) -> bool:
        """Whether the process runs, as seen from its own machine."""
        try:
            process = psutil.Process(self.pid)
            return process.create_time() == self.created and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


@dataclass(frozen=True)
class Ranks:
    """The other processes of a run: those that can be seen from here, and those of other machines."""

    near: tuple[Rank, ...] = ()
    far: tuple[Rank, ...] = ()

    @classmethod
    def meet(cls) -> Ranks:
        """All processes call this together."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return cls()
        this = Rank.this()
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, this)
        others = [rank for rank in everyone if rank.rank != this.rank]
        # Containers of one machine's name may not see each other's processes.
        near = tuple(rank for rank in others if rank.host == this.host and rank.is_there())
        return cls(near, tuple(rank for rank in others if rank not in near))

    def gone(self) -> str | None:
        """Which processes of this machine are gone now, in words; None for none."""
        gone = [rank for rank in self.near if not rank.is_there()]
        if not gone:
            return None
        which = ", ".join(f"rank {rank.rank} (process {rank.pid})" for rank in gone)
        return f"{which} of this run {'is' if len(gone) == 1 else 'are'} gone, killed or ended by an error of its own"

    def lost(self, error: RuntimeError) -> str | None:
        """Which processes are gone, in words; None where a collective did not fail for want of one."""
        # Where all end with the same error of the program, one of them is gone first.
        if not (isinstance(error, dist.DistError) or any(word in str(error).lower() for word in _OF_CONNECTIONS)):
            return None
        until = time.monotonic() + _PATIENCE
        while (words := self.gone()) is None and time.monotonic() < until:
            time.sleep(0.05)
        if words is not None:
            return words
        if self.far:
            hosts = ", ".join(sorted({rank.host for rank in self.far}))
            return f"the connection to a process of this run on another machine ({hosts}) is lost"
        return None


@contextmanager
def naming_lost_ranks(ranks: Ranks, kept: Callable[[], str]) -> Iterator[None]:
    """A collective of the block that fails because a process of the run is gone raises an error that says so.

    So does SIGTERM, where it comes after that: launchers send it to the processes that are left, and it may be faster
    than the error of a collective.

    Args:
        ranks: the processes.
        kept: what is kept of the work, in words, asked then.

    Raises:
        LostRankError: in place of the collective's error, or of what the signal raises.
    """
    try:
        yield
    except Stopped as error:
        if error.exit_code != TERMINATED or (words := ranks.gone()) is None:
            raise
        raise LostRankError(f"{words}; the others cannot go on without it. {kept()}") from error
    except RuntimeError as error:
        if isinstance(error, (LostRankError, NotImplementedError)) or is_out_of_memory(error):
            raise
        words = ranks.lost(error)
        if words is None:
            raise
        raise LostRankError(f"{words}; the others cannot go on without it. {kept()}") from error


def kept_in(output_dir: Path) -> str:
    """The last checkpoint of a run that lost a process, in words."""
    last = find_checkpoints(output_dir)[-1:]
    return f"{last[0]} is whole, the last checkpoint" if last else f"No checkpoint is in {output_dir} yet"


class WatchedRanks(Trainer):
    """``transformers.Trainer``, whose processes end with what a socket said where another one was killed."""

    args: DPOConfig

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._ranks = Ranks.meet()

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As ``Trainer``'s; raises LostRankError where a process is gone."""
        with self.naming_lost_ranks():
            return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As ``Trainer``'s; raises LostRankError where a process is gone."""
        with self.naming_lost_ranks():
            metrics: dict[str, float] = super().evaluate(*args, **kwargs)
            return metrics

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """As ``Trainer``'s; raises LostRankError where a process is gone."""
        with self.naming_lost_ranks():
            super().save_model(*args, **kwargs)

    def naming_lost_ranks(self, kept: str | None = None) -> AbstractContextManager[None]:
        """See :func:`naming_lost_ranks`; ``kept`` is by default the last checkpoint."""
        return naming_lost_ranks(self._ranks, lambda: kept or kept_in(self.args.folder))
