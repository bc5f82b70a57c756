"""How the CUDA back end on the host cuts its work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cuda_host.build import build

BLOCKS = "FASTDPO_CUDA_BLOCKS"


@pytest.fixture(scope="module")
def library(request: pytest.FixtureRequest) -> Iterator[Any]:
    torch.ops.load_library(str(build(request.config.cache.mkdir("cuda_host"))))
    yield torch.ops.fastdpo_host
    restore(torch.ops.fastdpo_host)


@pytest.fixture
def ops(library: Any) -> Iterator[Any]:
    configure(library)
    yield library
    restore(library)


def configure(ops: Any, *, rows: int = 16, chunk: int = 24, capturing: bool = False) -> None:
    """Token blocks of at most ``rows`` rows, and vocabulary chunks of ``chunk`` entries, a multiple of 8."""
    os.environ[BLOCKS] = f"{rows},{chunk}"
    ops.capture(capturing)


def restore(ops: Any) -> None:
    os.environ.pop(BLOCKS, None)
    ops.capture(False)
    ops.fail(False)
