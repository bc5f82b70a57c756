"""The portable path's ops by themselves, cut small, and as if on other devices than the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdpo.logps import portable_problem, portable_rows, wide
from fastdpo.logps.device_paths import PORTABLE_OPS

# As torch.ops.fastdpo is, for op_calls.
OPS = SimpleNamespace(token_logps_forward=PORTABLE_OPS.forward, token_logps_backward=PORTABLE_OPS.backward)


@contextmanager
def cut(rows: int, chunk: int) -> Iterator[None]:
    """Blocks of at most so many rows, and chunks of at most so many entries."""
    with patch.object(portable_problem, "_CPU_LARGEST", (rows, chunk)):
        yield


@contextmanager
def on_an_accelerator(*, capturing: bool = False) -> Iterator[None]:
    """The host looks at no value of its own accord, and at none at all in a captured graph."""
    with (
        patch.object(portable_rows, "may_look", lambda device: False),
        patch.object(portable_problem, "may_look", lambda device: False),
        patch.object(portable_rows, "is_capturing", lambda device: capturing),
    ):
        yield


class _Without(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float64:
                raise AssertionError(f"{func} made a float64 tensor")
        if "segment_reduce" in str(func):
            raise AssertionError("segment_reduce was called")
        return result


@contextmanager
def without_float64() -> Iterator[None]:
    """As on a device that has no float64 and no segment_reduce."""
    with patch.object(wide, "_HAVE_FLOAT64", ()), patch.object(wide, "_HAVE_SEGMENT_REDUCE", ()), _Without():
        yield
