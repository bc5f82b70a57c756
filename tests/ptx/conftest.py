"""The machine and the ops on it, built once for the same sources, in pytest's cache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ptxrun import build, ops
from ptxrun.machine import Machine


@pytest.fixture(scope="session")
def folder(request: pytest.FixtureRequest) -> Path:
    return request.config.cache.mkdir("ptx")


@pytest.fixture(scope="session")
def machine(folder: Path) -> Machine:
    return Machine(build.machine(folder))


@pytest.fixture(scope="session")
def level0_kernels(folder: Path) -> dict[str, ops.Compiled]:
    if ops.nvcc() is None:
        pytest.skip("no nvcc here: the CUDA kernels cannot be compiled, and nothing of them is run")
    return ops.level0(folder)


@pytest.fixture(scope="session")
def level0_library(folder: Path, machine: Machine, level0_kernels: dict[str, ops.Compiled]) -> Any:
    library = ops.library(folder, level0_kernels, "fastdpo_ptx", with_level1=False)
    torch.ops.load_library(str(library))
    return torch.ops.fastdpo_ptx


@pytest.fixture(scope="module", params=ops.ARCHS)
def arch(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def level0(level0_library: Any, level0_kernels: dict[str, ops.Compiled], machine: Machine, arch: str) -> Any:
    """The ops, and kernels from the architecture's PTX."""
    for compiled in level0_kernels.values():
        machine.add(compiled.ptx[arch].read_text())
    return level0_library


@pytest.fixture(scope="session")
def level1_kernels(folder: Path, level0_kernels: dict[str, ops.Compiled]) -> dict[str, ops.Compiled]:
    if ops.cutlass() is None:
        pytest.skip("no CUTLASS here (pip install --no-deps nvidia-cutlass==4.2.0.0): Level 1's kernels are not run")
    return ops.level1(folder)


@pytest.fixture(scope="module")
def level1(
    folder: Path,
    machine: Machine,
    level0_kernels: dict[str, ops.Compiled],
    level1_kernels: dict[str, ops.Compiled],
) -> Any:
    """The ops with Level 1's product, all kernels from sm_90a's PTX."""
    kernels = level0_kernels | level1_kernels
    library = ops.library(folder, kernels, "fastdpo_ptx_level1", with_level1=True)
    torch.ops.load_library(str(library))
    for compiled in kernels.values():
        machine.add(compiled.ptx["90a"].read_text())
    return torch.ops.fastdpo_ptx_level1


@pytest.fixture
def on_device(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A device of its own for the test, and small chunks, so that small cases have several."""
    monkeypatch.setenv("FASTDPO_CUDA_BLOCKS", "16,24")
    yield
    machine.options()
    for name in ("fastdpo_ptx", "fastdpo_ptx_level1"):
        if hasattr(getattr(torch.ops, name), "new_device"):
            getattr(torch.ops, name).new_device()
            getattr(torch.ops, name).capture(False)
            getattr(torch.ops, name).pretend(90, 2)
