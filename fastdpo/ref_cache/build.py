"""Reference log-probabilities for the trainer: read from the cache on disk, or computed, in parts that survive a kill.

The builder knows nothing of models: it is given a function from rows to their log-probabilities. Rows are taken by
length, longest first, so that batches hold little padding, and memory that does not suffice shows at once.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from fastdpo.data.files import TOKEN_COLUMNS
from fastdpo.data.images import IMAGE_COLUMNS
from fastdpo.data.row_digests import MASK_COLUMNS, rows_fingerprint
from fastdpo.data.share import DataShare
from fastdpo.data.terms import GROUP_TOKEN_COLUMNS, VISION_COLUMNS
from fastdpo.logps.out_of_memory import is_out_of_memory
from fastdpo.ref_cache.completions import Completions, completions_of
from fastdpo.ref_cache.files import RefCache, RefCacheError
from fastdpo.ref_cache.key import CacheKey

_GROUP_COLUMNS = (*GROUP_TOKEN_COLUMNS, "completion_mask")
_SCORED_COLUMNS = tuple(
    dict.fromkeys((*TOKEN_COLUMNS, *MASK_COLUMNS, *_GROUP_COLUMNS, *VISION_COLUMNS, *IMAGE_COLUMNS))
)
# A kill costs no more than this, and a write is small beside it.
PART_SECONDS = 20.0

# Rows (dicts with the token columns) -> log-probabilities of the chosen and of the rejected completions of all pairs of
# these rows, in their order.
ScoreRows = Callable[[list[dict[str, Any]]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class CachedSplit:
    """What was done for one dataset.

    Attributes:
        folder: where its log-probabilities are.
        rows: how many rows it has.
        rows_read: how many of them were there already.
        seconds: that it took to read and compute the log-probabilities.
        kind: what the rows are: pairs, or groups.
    """

    folder: Path
    rows: int
    rows_read: int
    seconds: float
    kind: str = "pairs"


@dataclass
class ReferenceBuilder:
    """Gives pairs the columns ``ref_chosen_logps`` and ``ref_rejected_logps``, and groups ``ref_completion_logps``.

    By way of a cache on disk, in which each distinct completion stands once.

    To be called by all processes of a run alike. The main process decides what is to be done, every process computes
    its share and writes its parts, and the main process joins them.

    Args:
        root: a folder, in which every dataset gets one of its own.
        accelerator: the run's.
        identity: the fields of ``CacheKey`` beside those of the rows; asked once, in the main process alone.
        score: see ``ScoreRows``.
        max_length: where sequences are cut; for the order of the rows and the expected time.
        about: facts for the manifest that are not compared.
        describe_row: words by which a person knows a row, for messages.
        show_progress: a progress bar, in the main process.
        by_pair: a completion's log-probability depends on the other one of its pair.
        in_step: the processes must call ``score`` equally often, as with a model that is sharded over them.

    Attributes:
        splits: what was done, by the dataset's name.
    """

    root: Path
    accelerator: Accelerator
    identity: Callable[[], dict[str, Any]]
    score: ScoreRows
    max_length: int | None = None
    about: dict[str, Any] = field(default_factory=dict)
    describe_row: Callable[[dict[str, Any]], str] = str
    show_progress: bool = True
    in_step: bool = False
    by_pair: bool = False
    splits: dict[str, CachedSplit] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.identity = functools.cache(self.identity)

    def with_columns(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """``dataset`` with the columns; computed in batches of ``batch_size`` rows where the cache lacks them.

        Raises:
            RefCacheError: the cache belongs to other weights, data or settings, or is damaged; in all processes.
        """
        start = time.perf_counter()
        cache, rows_read = RefCache(self.root / name), len(dataset)
        completions = completions_of(dataset, by_pair=self.by_pair)
        if not self._from_main(lambda: self._is_complete(cache, dataset, completions)):
            rows_read = self._complete(cache, dataset, completions, name, batch_size)
        # From one process to all, because the folder may be on the main process's machine alone.
        dataset = completions.with_columns(dataset, self._from_main(cache.load))
        kind = "groups" if completions.are_groups else "pairs"
        self.splits[name] = CachedSplit(cache.folder, len(dataset), rows_read, time.perf_counter() - start, kind)
        return dataset

    def with_columns_in_all(
        self, datasets: Dataset | dict[str, Dataset] | None, name: str, batch_size: int
    ) -> Dataset | dict[str, Dataset] | None:
        """The same for what ``Trainer`` takes for evaluation: a dataset, several by name, or None."""
        if isinstance(datasets, dict):
            return {key: self.with_columns(rows, f"{name}-{key}", batch_size) for key, rows in datasets.items()}
        return None if datasets is None else self.with_columns(datasets, name, batch_size)

    def _is_complete(self, cache: RefCache, dataset: Dataset, completions: Completions) -> bool:
        # Without the lock, which readers need not have: a complete cache does not change.
        manifest = cache.manifest()
        if manifest is None or not manifest["complete"]:
            return False
        cache.check(self._key(completions), completions.digests, self._words(dataset, completions))
        return True

    def _complete(self, cache: RefCache, dataset: Dataset, completions: Completions, name: str, batch_size: int) -> int:
        """Compute what is missing; returns how many rows were not."""
        start = time.perf_counter()
        with contextlib.ExitStack() as stack:
            # In the main process alone; that it could not, all hear.
            self._from_main(lambda: stack.enter_context(cache.lock()))
            key, done = self._from_main(lambda: self._begin_or_go_on(cache, dataset, completions, name, batch_size))
            self._compute(cache, key, done, dataset, completions, name, batch_size)
            self.accelerator.wait_for_everyone()
            seconds = {"seconds_of_the_last_run": round(time.perf_counter() - start, 1)}
            self._from_main(lambda: cache.finish(key, self._about(name, batch_size) | seconds))
        return int(done.sum())

    def _begin_or_go_on(
        self, cache: RefCache, dataset: Dataset, completions: Completions, name: str, batch_size: int
    ) -> tuple[CacheKey, np.ndarray]:
        """The key, and which rows are done [rows]."""
        key = self._key(completions)
        if cache.manifest() is None:
            cache.begin(key, completions.digests, self._about(name, batch_size))
        else:
            key = cache.check(key, completions.digests, self._words(dataset, completions))
        return key, completions.rows_done(cache.read_parts(key)[0])

    def _compute(
        self,
        cache: RefCache,
        key: CacheKey,
        done: np.ndarray,
        dataset: Dataset,
        completions: Completions,
        name: str,
        batch_size: int,
    ) -> None:
        """This process's share of the rows that are not done, and that some completion is computed with."""
        lengths = longer_lengths(dataset, self.max_length)
        computing = np.flatnonzero(completions.computing)
        batches = [computing[batch] for batch in sorted_batches(lengths[computing], batch_size, done[computing])]
        place = DataShare.of(self.accelerator)
        share = batches[place.index :: place.count]
        dataset = dataset.select_columns([name for name in _SCORED_COLUMNS if name in dataset.column_names])
        scored: list[tuple[np.ndarray, np.ndarray]] = []
        written = time.monotonic()
        told = [0, sum(map(len, share))]  # rows: done, all
        bar = tqdm(
            total=int(sum(lengths[batch].sum() for batch in share)),  # time goes with tokens, not with rows
            desc=f"Reference log-probabilities, {name}",
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {postfix[0]} of {postfix[1]} rows [{elapsed}<{remaining}]",
            postfix=cast(Any, told),  # for bar_format, which reads it as it is then
            disable=not (self.show_progress and self.accelerator.is_main_process),
        )

        def score(batch: np.ndarray) -> tuple[Tensor, Tensor]:
            columns = dataset[batch.tolist()]
            if completions.are_groups:
                columns["pairs"] = [completions.scored_with(row) for row in batch.tolist()]
            return self._score([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])

        def keep() -> None:
            if scored and place.is_first:
                cache.write_part(key, *_joined(scored))

        with bar, contextlib.ExitStack() as stack:
            stack.callback(keep)  # however this ends, short of a kill
            for batch in share:
                chosen, rejected = score(batch)
                scored.append(completions.of_rows(batch, chosen.cpu().numpy(), rejected.cpu().numpy()))
                if time.monotonic() - written >= PART_SECONDS:
                    keep()
                    scored, written = [], time.monotonic()
                told[0] += len(batch)
                bar.update(int(lengths[batch].sum()))
            # The main process has the most batches: one more than others, or as many.
            if self.in_step and len(share) < len(batches[:: place.count]):
                score(batches[-1])

    def _score(self, rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        try:
            return self.score(rows)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            longest = max(map(_longest, rows))
            raise torch.OutOfMemoryError(
                f"{error}\nThe reference was scoring {len(rows)} rows of up to {longest} tokens (before any cut). "
                "Smaller values of precompute_ref_batch_size or max_length (--precompute_ref_batch_size, "
                "--max_length) need less memory; what was computed so far is kept"
            ) from error

    def _key(self, completions: Completions) -> CacheKey:
        digests = completions.digests
        return CacheKey(**self.identity(), num_completions=len(digests), completions=rows_fingerprint(digests))

    def _words(self, dataset: Dataset, completions: Completions) -> Callable[[list[int]], str]:
        def words(some: list[int]) -> str:
            row = completions.first_row_of(some)
            return f"a completion of kept row {row} ({self.describe_row(dataset[row])})"

        return words

    def _about(self, name: str, batch_size: int) -> dict[str, Any]:
        return self.about | {
            "split": name,
            "batch_size": batch_size,
            "processes": self.accelerator.num_processes,
            "device": str(self.accelerator.device),
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "datasets")},
        }

    def _from_main(self, work: Callable[[], Any]) -> Any:
        """What ``work`` gives in the main process, in all; a RefCacheError is raised in all."""
        outcome: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                outcome = [work()]
            except RefCacheError as error:
                outcome = [error]
        broadcast_object_list(outcome)
        if isinstance(outcome[0], RefCacheError):
            raise outcome[0]
        return outcome[0]


def _joined(scored: Sequence[tuple[np.ndarray, ...]]) -> list[np.ndarray]:
    return [np.concatenate(arrays) for arrays in zip(*scored, strict=True)]


def _longest(row: dict[str, Any]) -> int:
    answers = row["completion_ids"] if "completion_ids" in row else [row[side] for side in TOKEN_COLUMNS[1:]]
    return len(row["prompt_ids"]) + max(map(len, answers))


def longer_lengths(dataset: Dataset, max_length: int | None) -> np.ndarray:
    """[rows] int64: tokens of the prompt with the longest completion, at most ``max_length``."""
    if "completion_ids" in dataset.column_names:
        groups = dataset.select_columns(list(GROUP_TOKEN_COLUMNS[:2]))
        lengths = [np.array([_longest(row) for row in groups], np.int64)]
    else:
        lengths = []
        for table in dataset.select_columns(list(TOKEN_COLUMNS)).with_format("arrow").iter(batch_size=10_000):
            prompt, chosen, rejected = (pc.list_value_length(table.column(name)).to_numpy() for name in TOKEN_COLUMNS)
            lengths.append(prompt.astype(np.int64) + np.maximum(chosen, rejected))
    limit = np.iinfo(np.int64).max if max_length is None else max_length
    cut: np.ndarray = np.minimum(np.concatenate(lengths), limit)
    return cut


def sorted_batches(lengths: np.ndarray, batch_size: int, done: np.ndarray) -> list[np.ndarray]:
    """Row numbers in batches, the longest rows first, without those that are done.

    Batches are cut before rows that are done are left out: a build that goes on after a kill has the batches, and so
    the padding and the rounding, of one that was not killed.
    """
    order = np.argsort(-lengths, kind="stable")
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return [left for batch in batches if len(left := batch[~done[batch]])]
