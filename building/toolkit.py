"""The CUDA toolkit, what it compiles for, and CUTLASS's headers."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# Compute capability -> the first CUDA toolkit that compiles for it (and C++20, which 12.0 is the first to know).
CUDA_ARCHS = {"8.0": (12, 0), "8.6": (12, 0), "8.9": (12, 0), "9.0a": (12, 0), "10.0": (12, 8), "12.0": (12, 8)}
# What Level 1's kernels are compiled for: wgmma and TMA are this architecture's alone.
LEVEL1_ARCH = "9.0a"


class Toolkit(NamedTuple):
    """A CUDA toolkit."""

    nvcc: str
    version: str  # such as 13.0
    home: Path


def find_toolkit() -> Toolkit | None:
    """The toolkit of CUDA_HOME or of the nvcc on PATH; None where there is none."""
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/nvcc"] if home else []
    candidates += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    for candidate in filter(None, candidates):
        if Path(candidate).is_file():
            version = subprocess.run([candidate, "--version"], capture_output=True, text=True, check=True).stdout
            # nvcc itself knows best where its toolkit lies: what is on PATH may be a script or a link.
            steps = subprocess.run([candidate, "--dryrun", "none.cu"], capture_output=True, text=True).stderr
            home = Path(re.search(r"^#\$ TOP=(.+)$", steps, re.M).group(1)).resolve()
            return Toolkit(candidate, re.search(r"release (\d+\.\d+)", version).group(1), home)
    return None


@functools.cache  # says what it leaves out once
def cuda_archs(toolkit: Toolkit) -> tuple[str, ...]:
    """What is compiled for, written as in CUDA_ARCHS: all of those, cut by TORCH_CUDA_ARCH_LIST and by the toolkit."""
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    names = list(CUDA_ARCHS) if not wanted.strip() else re.split(r"[ ;,]+", wanted.strip())
    plain = [name.removesuffix("+PTX") for name in names]
    asked = [{"9.0": "9.0a"}.get(name, name) for name in plain]
    version = tuple(map(int, toolkit.version.split(".")))
    archs = tuple(arch for arch, least in CUDA_ARCHS.items() if arch in asked and version >= least)
    left_out = [arch for arch in asked if arch not in archs]
    if left_out:
        print(f"fastdpo: no kernels for compute capability {', '.join(left_out)} (with CUDA {toolkit.version})")
    if not archs:
        sys.exit(
            f"TORCH_CUDA_ARCH_LIST is {wanted!r} and the toolkit CUDA {toolkit.version}, which leaves nothing of what "
            f"fastdpo has kernels for ({', '.join(CUDA_ARCHS)}; 10.0 and 12.0 need CUDA 12.8, the others 12.0)"
        )
    return archs


def gencode(archs: Sequence[str]) -> list[str]:
    numbers = [arch.replace(".", "") for arch in archs]
    return [f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers]


def own_gpus() -> list[str]:
    """The compute capabilities of this machine's GPUs, as the driver's tool names them; none where it is not."""
    if (tool := shutil.which("nvidia-smi")) is None:
        return []
    command = [tool, "--query-gpu=compute_cap", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True).stdout
    return sorted(set(re.findall(r"^\d+\.\d$", said, re.M)))


class Level1(NamedTuple):
    """CUTLASS's headers for Level 1, or why it is not built."""

    headers: Path | None
    missing: str | None


def find_level1(archs: Sequence[str]) -> Level1:
    if LEVEL1_ARCH not in archs:
        return Level1(None, f"compute capability {LEVEL1_ARCH} is not among those built for")
    package = importlib.util.find_spec("cutlass_library")
    headers = Path(package.origin).parent / "source/include" if package is not None and package.origin else None
    if headers is None or not (headers / "cutlass/cutlass.h").is_file():
        return Level1(None, "the package nvidia-cutlass was not installed")
    return Level1(headers, None)


def level1_fact(toolkit: Toolkit | None) -> str:
    missing = find_level1(cuda_archs(toolkit)).missing if toolkit is not None else "there was no nvcc"
    return "built" if missing is None else f"not built: {missing}"
