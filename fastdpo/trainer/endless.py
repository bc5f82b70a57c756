"""A stream of rows that begins again where it ends: a run on one makes as many steps as it was told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import datasets
from torch.utils.data import IterableDataset, get_worker_info

from fastdpo.data.terms import DataError


class EndlessRows(IterableDataset[dict[str, Any]]):
    """The rows of a stream, pass after pass, each in an order of its own where the stream is shuffled.

    Trainer begins a stream anew itself, but a step that the stream's end cuts short it does not make: what the pairs of
    it came to is added to the next step, and one of fewer pairs than a step has is read for ever. It skips batches of
    the first pass alone when it goes on with a run. Here batches and steps go over the end.

    Args:
        rows: shuffled by way of a buffer, or in their own order.

    Raises:
        DataError: a pass has no rows; when they are asked for, but by a loader's workers, of which each has a share.
    """

    def __init__(self, rows: datasets.IterableDataset) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        number = 0
        while True:
            rows = self._rows.with_format(None)  # with an epoch of its own: workers share that of the one that they got
            rows.set_epoch(number)
            is_empty = True
            for row in rows:
                is_empty = False
                yield row
            if is_empty and get_worker_info() is not None:
                return  # a loader's worker that there was no file left for
            if is_empty:
                raise DataError("No pair of the stream is left to train on; the warnings say what became of them.")
            number += 1
