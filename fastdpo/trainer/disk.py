"""Disks that are full: noticed before something is written, and told in a line where a write fails."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastdpo.errors import InputError

# What a write fails with for want of room, or of a sound disk; anything else is a fault of another kind.
_ERRNOS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS))
# safetensors and tokenizers tell the number in words; torch's writer of archives tells nothing but that it failed, and
# where that is in its last bytes, C++'s streams do.
_OS_ERROR = re.compile(r"os error (\d+)")
_TORCH_WRITER = re.compile(r"PytorchStreamWriter|inline_container|file write failed|iostream|ios_base")


class NotWrittenError(InputError):
    """Something could not be written; the message says what, why, and what there is all the same."""


def why_not_written(error: BaseException) -> str | None:
    """In words, why a file could not be written; None where ``error`` and its causes are about something else."""
    for cause in chain(error):
        number = None
        if isinstance(cause, OSError):
            number = cause.errno
        elif match := _OS_ERROR.search(str(cause)):
            number = int(match[1])
        if number in _ERRNOS:
            return os.strerror(number)
        if isinstance(cause, RuntimeError) and _TORCH_WRITER.search(str(cause)):
            return "a file could not be written to its end (is the disk full, or a quota reached?)"
    return None


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what caused it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def free_bytes(folder: Path) -> int:
    """What is free where ``folder`` is, or will be."""
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def size_in_words(size: float) -> str:
    """``1.5 GB`` and the like, as disks are sold."""
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def folder_bytes(folder: Path) -> int:
    """What the files in a folder hold."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def checkpoint_bytes(model: torch.nn.Module, optimizer: Any, *, is_adapter: bool) -> int:
    """What a checkpoint will hold at least: the weights that are saved, and the optimiser's state.

    Args:
        model: what is trained, whole.
        optimizer: its state is counted as it is once it has some. Before, it is taken for as much as an Adam's, unless
            its name says otherwise.
        is_adapter: weights that are not trained are not saved.
    """
    parameters = {id(p): p for p in model.parameters() if p.requires_grad or not is_adapter}.values()
    weights = sum(p.numel() * p.element_size() for p in parameters)
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's is around it
    state = getattr(optimizer, "state", {})
    kept = [value for of_one in state.values() for value in of_one.values() if isinstance(value, torch.Tensor)]
    if kept:
        return weights + sum(value.numel() * value.element_size() for value in kept)
    is_adam = "adam" in type(optimizer).__name__.lower()
    is_small = any(word in type(optimizer).__name__.lower() for word in ("8bit", "4bit", "paged"))
    trained = [p for p in parameters if p.requires_grad]
    return weights + (2 * sum(p.numel() * p.element_size() for p in trained) if is_adam and not is_small else 0)
