"""Builds csrc/cuda as a device would have it, but for the device.

nvcc's own objects and PTX, the library's C++ sources, and the stand-ins of tests/ptx/stand_ins for the CUDA runtime,
cuBLAS and torch's CUDA.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

from ptxrun import build

CUDA = build.ROOT / "csrc" / "cuda"
STAND_INS = build.HERE.parent / "stand_ins"
# What is taken from torch: the stand-ins answer instead.
WRAPPED = ["aoti_torch_get_data_ptr", "aoti_torch_get_device_index", "torch_call_dispatcher"]
ARCHS = ("80", "90a")


@functools.cache
def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    candidates = [f"{home}/bin/nvcc"] if home else []
    candidates += [shutil.which("nvcc") or "", "/usr/local/cuda/bin/nvcc"]
    return next((c for c in candidates if c and Path(c).is_file()), None)


@functools.cache
def toolkit() -> Path:
    """nvcc itself knows best where its toolkit lies: what is on PATH may be a script."""
    steps = subprocess.run([nvcc(), "--dryrun", "none.cu"], capture_output=True, text=True).stderr
    return next(Path(line[len("#$ TOP=") :]) for line in steps.splitlines() if line.startswith("#$ TOP=")).resolve()


@functools.cache
def cutlass() -> Path | None:
    """CUTLASS's headers, of the installed package as for building/, or where `make test` has put them."""
    package = importlib.util.find_spec("cutlass_library")
    folders = [Path(package.origin).parent] if package is not None and package.origin else []
    folders.append(Path(sys.prefix) / "headers" / "cutlass_library")
    headers = (folder / "source" / "include" for folder in folders)
    return next((h for h in headers if (h / "cutlass" / "cutlass.h").is_file()), None)


@dataclass(frozen=True)
class Compiled:
    """What nvcc makes of one .cu file."""

    object: Path
    ptx: dict[str, Path]  # architecture -> file


def compile_cu(
    source: Path, folder: Path, archs: tuple[str, ...] = ARCHS, cutlass_headers: Path | None = None
) -> Compiled:
    """The flags are building/libraries.py's; the object embeds PTX, which nobody reads, in place of machine code."""
    gencode = [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in archs]
    command = [nvcc(), "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC", *gencode]
    headers = build.included(source)
    settings = [build.run([nvcc(), "--version"]), *command]
    if cutlass_headers is not None:
        # Which headers they are says their version; where they lie does not matter.
        headers.add(cutlass_headers / "cutlass" / "version.h")
        command += ["-DNDEBUG", "-isystem", cutlass_headers]

    def make(target: Path) -> None:
        """One pass, whose intermediate files are kept: the PTX is the object's own."""
        kept = folder / f"kept_{source.stem}_{os.getpid()}"
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        build.run([*command, "-keep", "-keep-dir", kept, "-c", source, "-o", kept / "object.o"])
        target.mkdir()
        for arch in archs:
            name = f"{source.stem}.ptx" if len(archs) == 1 else f"{source.stem}.compute_{arch}.ptx"
            (kept / name).rename(target / f"{arch}.ptx")
        (kept / "object.o").rename(target / "object.o")
        shutil.rmtree(kept)

    made = build.cached(folder, f"{source.stem}.nvcc", [source, *headers], settings, make)
    return Compiled(made / "object.o", {arch: made / f"{arch}.ptx" for arch in archs})


def level0(folder: Path) -> dict[str, Compiled]:
    return {source.stem: compile_cu(source, folder) for source in sorted(CUDA.glob("*.cu"))}


def level1(folder: Path) -> dict[str, Compiled]:
    """Level 1's five kernels: a minute of a processor's time, once."""
    return {"level1": compile_cu(STAND_INS / "level1.cu", folder, ("90a",), cutlass())}


def library(folder: Path, kernels: dict[str, Compiled], name: str, with_level1: bool) -> Path:
    """The ops as torch.ops.``name``; loaded behind ``machine``."""
    replaced = ["binding"] if with_level1 else ["binding", "exponentials"]
    own = [CUDA, build.MACHINE, STAND_INS]
    sources = [s for s in sorted(CUDA.glob("*.cpp")) if s.stem not in replaced] + sorted(STAND_INS.glob("*.cpp"))
    flags = [
        *build.FLAGS,
        "-Wno-unused-parameter",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        f'-DPTX_TORCH="{torch.__version__}"',  # read by nobody, but another torch means another object
        *(f"-I{directory}" for directory in own),
        f"-isystem{toolkit() / 'include'}",
        *(f"-isystem{path}" for path in include_paths()),
    ]
    stable = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]

    def flags_of(source: Path) -> list[str]:
        # What differs between the libraries is given to nothing else, and the rest is compiled once.
        of_source = [f"-DPTX_OPS={name}"] if source.stem == "binding" else []
        if source.stem == "exponentials" and not with_level1:
            of_source.append("-DFASTDPO_NO_LEVEL1=stand_in")
        # torch_device.cpp looks behind the stable ABI, at the tensors themselves.
        return [*flags, *of_source, *([] if source.stem == "torch_device" else stable)]

    objects = build.compile_all(sources, flags_of, folder / "objects", own)
    torch_libraries = Path(torch.__file__).parent / "lib"
    link = [
        *(f"-Wl,--wrap={symbol}" for symbol in WRAPPED),
        f"-L{torch_libraries}",
        "-ltorch",
        "-ltorch_cpu",
        "-lc10",
        f"-Wl,-rpath,{torch_libraries}",
    ]
    return build.link(f"lib{name}.so", [*objects, *(compiled.object for compiled in kernels.values())], link, folder)
