"""What ``train`` and ``cache-ref`` print, and how they end where the disk is full."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastdpo.commands.terminal import SafeConsole
from fastdpo.data.visible import visible
from fastdpo.errors import LostRankError, UsageError
from fastdpo.ref_cache.files import RefCacheError
from fastdpo.trainer.disk import NotWrittenError, chain, why_not_written
from fastdpo.trainer.lost_ranks import Ranks, naming_lost_ranks
from fastdpo.trainer.saving import kept
from fastdpo.trainer.trainer import DPOTrainer

console = SafeConsole(soft_wrap=True)


def say(text: str) -> None:
    """A line on standard error, for who looks there alone."""
    print(visible(text), file=sys.stderr, flush=True)


@contextmanager
def telling_how_to_go_on(kept: Callable[[], str], command: Callable[[], str]) -> Iterator[None]:
    """Where a process of the run is gone, the others say which one, what is kept, and what to type; both asked then."""
    try:
        with naming_lost_ranks(Ranks.meet(), kept):
            yield
    except LostRankError as error:
        raise LostRankError(f"{error}. Start all processes again, with:\n  {command()}") from error


def check_names(**names: str | None) -> None:
    """Raises UsageError for names of folders, by flag, that the libraries which read and write in them do not take."""
    for flag, name in names.items():
        if "\0" in (name or ""):
            raise UsageError(f"--{flag} {name}: no name on a disk holds a NUL.")
        try:
            (name or "").encode("utf-8")
        except UnicodeEncodeError as error:
            advice = (
                "rename it"
                if sys.getfilesystemencoding() == "utf-8"
                else f"this locale has names in {sys.getfilesystemencoding()} alone; PYTHONUTF8=1 reads others"
            )
            raise UsageError(f"--{flag} {name}: this name holds bytes that are no text ({advice}).") from error


@contextmanager
def bad_writes(output_dir: Path, advice: str | None = None) -> Iterator[None]:
    """Turn errors of a full disk, whatever it was that could not be written, into UsageError with what there is.

    Args:
        output_dir: of the run.
        advice: what to do; by default, what there is to say of a training's checkpoints.
    """
    try:
        yield
    except Exception as error:
        said = next((cause for cause in chain(error) if isinstance(cause, (NotWrittenError, RefCacheError))), None)
        if said is not None:
            raise UsageError(str(said)) from error
        if (why := why_not_written(error)) is None:
            raise
        named = [name for cause in chain(error) if (name := getattr(cause, "filename", None))]
        what = named[0] if named else f"a file in {output_dir}"
        raise UsageError(f"{what} could not be written: {why}. {advice or kept(output_dir)}") from error


def say_what_was_prepared(trainer: DPOTrainer) -> None:
    """Print what became of the rows, where the reference's log-probabilities are, and how many were there before."""
    for name, summary in trainer.data_summaries.items():
        console.print(f"\n{name}", style="bold")
        console.print(summary.table())
    for name, split in trainer.reference_splits.items():
        computed = split.rows - split.rows_read
        how = f"{split.rows_read} {split.kind} read{f', {computed} computed' if computed else ''}"
        console.print(f"Reference log-probabilities, {name}: {how}, {split.seconds:.1f} s: {split.folder}")
