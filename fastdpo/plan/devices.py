"""How much memory a device has."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import psutil
import torch

_UNITS = {"": 2**30, "gib": 2**30, "g": 2**30, "gb": 10**9, "mib": 2**20, "mb": 10**6, "tib": 2**40, "tb": 10**12}

# What an accelerator's driver, its libraries and the allocator's gaps take, as nobody can know beforehand.
RESERVED = {"cpu": 0}
RESERVED_ON_ACCELERATOR = 1 << 30


def parse_memory(words: str) -> int:
    """Bytes, of ``24GiB``, ``80GB``, ``512MiB``; of a number alone, GiB.

    Raises:
        ValueError: it is none of these.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", words)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"{words!r} is no amount of memory; it should be like 24GiB, 80GB or 512MiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def check_kind(device: str) -> None:
    """Refuse what is no kind of device.

    Raises:
        ValueError: torch does not know it, or it is one device of a kind.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ValueError(f"{device!r} is no kind of device; it should be like cpu, cuda, xpu or mps") from None
    if kind != device:
        raise ValueError(f"{device!r} is one device; give its kind, {kind}")


def memory_of(device: str) -> int | None:
    """What this machine's device has in all; None for an accelerator that is not here.

    In a container a CPU's memory is what the container may use.
    """
    if device == "cpu":
        return min([int(psutil.virtual_memory().total), *group_limits()])
    if device == "cuda" and torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(0).total_memory)
    return None


def group_limits(root: Path = Path("/")) -> list[int]:
    """What this process's control groups, and those that they are in, may use of memory (Linux's, of both versions)."""
    with contextlib.suppress(OSError):
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
        kinds = {"": ("sys/fs/cgroup", "memory.max"), "memory": ("sys/fs/cgroup/memory", "memory.limit_in_bytes")}
        limits = []
        for _, kind, path in groups:
            if kind in kinds:
                mount, name = kinds[kind]
                # In a container its own group may be all that is mounted, and the path be that of another place.
                inner = Path(path.lstrip("/"))
                limits += [_limit(root / mount / folder / name) for folder in (inner, *inner.parents)]
        return [limit for limit in limits if limit is not None]
    return []


def _limit(file: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):  # it is not there, or "max"
        return int(file.read_text())
    return None


def device_here() -> str:
    """The kind that a run on this machine would use."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return "cpu" if accelerator is None else accelerator.type


def in_words(size: int) -> str:
    """``23.4 GiB`` or ``512 MiB``."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"
