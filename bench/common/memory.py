"""The most memory that was held since a mark."""

from __future__ import annotations

import ctypes
import gc
from contextlib import suppress
from pathlib import Path

import torch


class CPUMemory:
    """The process's resident memory, where the system tells it (Linux)."""

    @staticmethod
    def mark() -> int | None:
        """Forgets the peak so far and returns the memory held now, in bytes."""
        gc.collect()
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # what was freed before shall not hide what is allocated next
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            return _resident("VmRSS")
        return None

    @staticmethod
    def peak() -> int:
        return _resident("VmHWM")


class CUDAMemory:
    """The allocator's own count."""

    @staticmethod
    def mark() -> int | None:
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    @staticmethod
    def peak() -> int:
        return torch.cuda.max_memory_allocated()


def memory_of(device: str) -> type[CPUMemory] | type[CUDAMemory]:
    return CUDAMemory if device == "cuda" else CPUMemory


def _resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024
