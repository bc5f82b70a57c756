"""The checkpoints in an output folder: which are whole, which one a resume means, and what to do with old ones."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from fastdpo.errors import InputError, UsageError
from fastdpo.trainer.damage import STATE_FILE, damage_without_manifest, missing_state
from fastdpo.trainer.json_files import read_object
from fastdpo.trainer.leftovers import is_half_written
from fastdpo.trainer.manifest import MANIFEST_FILE, damage_in, read_manifest

logger = logging.getLogger(__name__)

# The record of what the policy was like before the first step; see fastdpo.report.snapshot.
START_FILE = "report_start.json"


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder that were written to their end, in the order of their steps."""
    return [path for path in _in_order(folder) if _is_whole(path)]


def find_torn(folder: Path) -> list[Path]:
    """The checkpoints in a folder whose writing was broken off, in the order of their steps."""
    return [path for path in _in_order(folder) if not _is_whole(path)]


def _in_order(folder: Path) -> list[Path]:
    steps = {path: _step_of(path) for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    return [path for _, path in sorted((step, path) for path, step in steps.items() if step is not None)]


def _step_of(path: Path) -> int | None:
    step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(step) if step.isascii() and step.isdigit() and path.is_dir() else None


def _is_whole(checkpoint: Path) -> bool:
    """The manifest is what a checkpoint's writing ends with; a killed run, or a full disk, may have left less."""
    manifest = read_manifest(checkpoint)
    return manifest is not None and manifest.is_complete(checkpoint)


def resolve_resume(value: str | None, output_dir: Path) -> Path | None:
    """The checkpoint that ``--resume_from_checkpoint`` means; None where it was not given or is false.

    ``auto`` is ``last`` where there is a checkpoint, and nothing where there is none.

    Raises:
        UsageError: there is no such checkpoint, or it is damaged.
    """
    if value is None or value.lower() in ("false", "no", "0"):
        return None
    try:
        if value.lower() in ("true", "last", "yes", "1"):
            return last_whole(output_dir)
        if value.lower() == "auto":
            return _last_whole(output_dir)
        refuse_damaged(Path(value))
    except InputError as error:
        there = [path.name for path in find_checkpoints(output_dir) if path.resolve() != Path(value).resolve()]
        known = f" In {output_dir}: {', '.join(there)}." if there else ""
        raise UsageError(f"--resume_from_checkpoint {value}: {error}.{known}") from error
    return Path(value)


def last_whole(folder: Path) -> Path:
    """The last checkpoint in a folder, all of whose files are as they were written; those after it are named in a log.

    Raises:
        InputError: there is none.
    """
    found = _last_whole(folder)
    if found is None:
        old = [path.name for path in _in_order(folder) if not (path / MANIFEST_FILE).exists() and read_state(path)]
        how = f"; {', '.join(old)} without a manifest can be tried by name" if old else ""
        raise InputError(
            f"no whole checkpoint in {folder}{how}. Leave the flag out to start from the beginning, or name the "
            "checkpoint's folder"
        )
    return found


def _last_whole(folder: Path) -> Path | None:
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    found: list[Path | None] = [None]
    if not several or torch.distributed.get_rank() == 0:
        for path in reversed(_in_order(folder)):
            damage = damage_in(path) or missing_state(path)
            if not damage:
                found = [path]
                break
            logger.warning("%s is passed over: %s.", path, "; ".join(damage))
    if several:
        torch.distributed.broadcast_object_list(found, src=0)  # to read all of it is one process's work
    return found[0]


def refuse_damaged(checkpoint: Path) -> None:
    """Raises unless ``checkpoint`` is one, and whole.

    Raises:
        InputError: it is not; the message names the files, and their tensors where these can be told.
    """
    if not read_state(checkpoint) and not (checkpoint / MANIFEST_FILE).exists():
        what = "cannot be read" if (checkpoint / STATE_FILE).exists() else "is not there"
        raise InputError(f"{checkpoint} is not a checkpoint ({STATE_FILE} {what})")
    if (checkpoint / MANIFEST_FILE).exists():
        damage = damage_in(checkpoint) or missing_state(checkpoint)
    else:
        damage = missing_state(checkpoint) or damage_without_manifest(checkpoint)
    if damage:
        raise InputError(f"{checkpoint} is damaged: {'; '.join(damage)}")


def is_end(checkpoint: Path, *, max_steps: int, num_train_epochs: float) -> bool:
    """Whether a run of this length (in epochs where ``max_steps`` is not above 0) has nothing left to do there."""
    state = read_state(checkpoint)
    step: int = state.get("global_step", 0)
    if max_steps > 0:
        return step >= max_steps
    return bool(step >= state.get("max_steps", math.inf) and state.get("epoch", 0) >= num_train_epochs)


def came_from(output_dir: Path, checkpoint: Path) -> bool:
    """Whether what lies in ``output_dir`` is what a run left that went on from the checkpoint, or ended there."""
    history: list[Any] = read_state(checkpoint).get("log_history", [])
    left: list[Any] = read_state(output_dir).get("log_history", [])
    return left[: len(history)] == history != []


def read_state(folder: Path) -> dict[str, Any]:
    """trainer_state.json; empty where it is not there, or broken."""
    return read_object(folder / STATE_FILE) or {}


def remove_torn(output_dir: Path, resumed: Path | None) -> list[Path]:
    """Remove the checkpoints that a killed run was writing, which the run that goes on writes again.

    What lacks a manifest and was not being written by us is not touched: another program's may be whole.

    Args:
        output_dir: the run's folder.
        resumed: the checkpoint that the run goes on from; None where there is none that is whole.
    """
    if resumed is not None and resumed.resolve().parent != output_dir.resolve():
        return []
    torn = [path for path in find_torn(output_dir) if is_half_written(path)]
    for path in torn:
        shutil.rmtree(path, ignore_errors=True)
    return torn


def set_aside(output_dir: Path, resumed: Path | None = None) -> Path | None:
    """Move the checkpoints that a run would write over to a folder beside them, and return it; None if there are none.

    Left where they are, they would be overwritten step by step, and "the last checkpoint" would be a mixture of two
    runs; or, after a kill in the middle of it, of the files of two checkpoints. With them goes the record of that run's
    start, which a report of its continuation needs, unless the run goes on from one that stays.

    Args:
        output_dir: the run's folder.
        resumed: the checkpoint that the run goes on from. It and those before it stay, if it is one of this folder.
    """
    first = 0
    if resumed is not None and resumed.resolve().parent == output_dir.resolve():
        first = (_step_of(resumed) or 0) + 1
    steps = {path: _step_of(path) for path in output_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")}
    old = [path for path, step in steps.items() if step is not None and step >= first]
    if not old:
        return None
    number = 1
    while (folder := output_dir / f"previous-{number}").exists():
        number += 1
    folder.mkdir()
    start = output_dir / START_FILE
    if first == 0 and start.exists():
        old.append(start)
    for path in old:
        path.rename(folder / path.name)
    return folder
