"""Which part of the data a process has: its own, or, where several hold parts of a model or of sequences, theirs."""

from __future__ import annotations

from dataclasses import dataclass

from accelerate import Accelerator
from torch import Tensor


@dataclass(frozen=True)
class DataShare:
    """A process's place among those that have different data.

    Attributes:
        index: from 0 on.
        count: how many different shares there are.
        copies: how many processes have each of them, one after another: those of tensor or context parallelism.
        is_first: whether this is the first process that has its share, which does for all what is to be done once.
    """

    index: int
    count: int
    copies: int = 1
    is_first: bool = True

    @classmethod
    def of(cls, accelerator: Accelerator) -> DataShare:
        """As accelerate gives out batches."""
        config = accelerator.parallelism_config
        copies = 1 if config is None else int(config.non_data_parallel_size)
        index, place = divmod(accelerator.process_index, copies)
        return cls(index, accelerator.num_processes // copies, copies, place == 0)

    def once(self, gathered: Tensor) -> Tensor:
        """Of the rows of all processes [R * B, …] those of each share, once [R * B / copies, …]."""
        if self.copies == 1:
            return gathered
        rows: Tensor = gathered.unflatten(0, (self.count, self.copies, -1))[:, 0].flatten(0, 1)
        return rows
