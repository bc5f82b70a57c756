"""What a killed run leaves half-written in its folder, told from everything else by marks, so that it does not stay.

A kill leaves no chance to tidy up. So each place says beforehand what may be left there: a mark lies in a folder while
files are written into it, and a lock in what is there for a moment.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fastdpo.ref_cache.durable import UNFINISHED
from fastdpo.ref_cache.lock import HeldError, held

logger = logging.getLogger(__name__)

_MARK = f"{UNFINISHED}save"
_TRIAL = ".round-trip-"
_TRIAL_LOCK = ".held"
# What safetensors calls a file until it is whole.
_DRAFT = re.compile(r"\.tmp[A-Za-z0-9]{6}")


@contextlib.contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Mark ``folder`` for the duration of the block; a mark that is there is its maker's to remove.

    The folder is made, and goes again if nothing was written into it.
    """
    mark = folder / _MARK
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    if mark.exists():
        yield
        return
    mark.touch()
    try:
        yield
    finally:
        mark.unlink(missing_ok=True)
        if is_new:
            with contextlib.suppress(OSError):  # there is something in it
                folder.rmdir()


def is_half_written(folder: Path) -> bool:
    """Whether a process died while it wrote into the folder, if nobody writes there now."""
    return (folder / _MARK).exists()


@contextlib.contextmanager
def trial_folder(inside: Path) -> Iterator[Path]:
    """A folder for the duration of the block; ``inside`` is made, and goes again where nobody else put something in."""
    is_new = not inside.exists()
    inside.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=_TRIAL, dir=inside) as name, held(Path(name) / _TRIAL_LOCK):
            yield Path(name)
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # there is something in it
                inside.rmdir()


def remove_leftovers(output_dir: Path) -> list[str]:
    """Remove what dead processes left half-written in a run's own folder; not in its checkpoints.

    Args:
        output_dir: in which no other run is.

    Returns:
        What it was, by name.
    """
    removed = []
    for path in sorted(output_dir.glob(".*")):
        with contextlib.suppress(OSError):  # somebody else's, or gone
            if path.is_dir():
                gone = path.name.startswith(_TRIAL) and _remove_trial(path)
            else:
                gone = _is_leftover(path)
                if gone:
                    path.unlink()
            if gone:
                removed.append(path.name)
    with contextlib.suppress(OSError):
        (output_dir / _MARK).unlink(missing_ok=True)
    if removed:
        logger.warning("A run that was killed had left unfinished in %s, removed: %s.", output_dir, ", ".join(removed))
    return removed


def _is_leftover(path: Path) -> bool:
    if path.name == _MARK or path.is_symlink():
        return False
    if path.name.startswith(UNFINISHED):
        return True
    mark = path.with_name(_MARK)
    # A name that others may use as well: ours is younger than the mark.
    is_draft = _DRAFT.fullmatch(path.name) is not None and mark.exists()
    return is_draft and path.stat().st_mtime_ns >= mark.stat().st_mtime_ns


def _remove_trial(folder: Path) -> bool:
    if folder.is_symlink():
        return False
    if not (folder / _TRIAL_LOCK).exists():
        folder.rmdir()  # nothing is in it yet, or it is not ours
        return True
    try:
        with held(folder / _TRIAL_LOCK):
            shutil.rmtree(folder)
    except HeldError:
        return False
    return True
