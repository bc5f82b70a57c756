"""How the CUDA back end on the host cuts its work."""

from __future__ import annotations

import os
from typing import Any

BLOCKS = "FASTDPO_CUDA_BLOCKS"


def configure(ops: Any, *, rows: int = 16, chunk: int = 24, capturing: bool = False) -> None:
    """Token blocks of at most ``rows`` rows, and vocabulary chunks of ``chunk`` entries, a multiple of 8."""
    os.environ[BLOCKS] = f"{rows},{chunk}"
    ops.capture(capturing)


def restore(ops: Any) -> None:
    os.environ.pop(BLOCKS, None)
    ops.capture(False)
    ops.fail(False)
