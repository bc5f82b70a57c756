"""Builds the two native libraries with ninja: the CPU ops against ATen, and, where nvcc is, the CUDA ops.

The CPU library (fastdpo._C) fits one torch and one Python. The CUDA library (fastdpo/fastdpo_cuda.so) is built against
LibTorch's stable ABI and holds no Python, so one file serves any torch from 2.10 on and any Python; it is built whether
or not the installed torch has CUDA, and carried along where no nvcc is.

The CUDA library's Level 1, a product of our own for Hopper, is built where CUTLASS's headers are (the package
nvidia-cutlass); elsewhere fastdpo.build_info() says why not.

TORCH_CUDA_ARCH_LIST cuts the list of GPU architectures (what it names beside them, and what the toolkit is too old for,
is left out), MAX_JOBS the number of compilers at once.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M).group(1)
# Compute capability -> the first CUDA toolkit that compiles for it (and C++20, which 12.0 is the first to know).
CUDA_ARCHS = {"8.0": (12, 0), "8.6": (12, 0), "8.9": (12, 0), "9.0a": (12, 0), "10.0": (12, 8), "12.0": (12, 8)}
# The oldest torch whose stable ABI the CUDA library asks for: 2.10, as torch encodes it.
TARGET_TORCH = "0x020a000000000000"
# What Level 1's kernels are compiled for: wgmma and TMA are this architecture's alone.
LEVEL1_ARCH = "9.0a"
# What compiling one of them takes, with room.
LEVEL1_MEMORY = 6 << 30


def flags_of(cpu_source: Path) -> list[str]:
    """The instruction set of a vectorised kernel's file; every other file is compiled for the compiler's default."""
    avx512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"]
    # GCC's own intrinsics start from variables that are not set (its bug 105593).
    quiet = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]
    return {
        "row_kernels_avx512.cpp": avx512,
        "row_kernels_avx2.cpp": ["-mavx2", "-mfma"],
        "tile_kernels_avx512_bf16.cpp": [*avx512, "-mavx512bf16", *quiet],
        "tile_kernels_avx512.cpp": [*avx512, *quiet],
        "tile_kernels_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    }.get(cpu_source.name, [])


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


def ninja_path() -> str:
    """The ninja executable: the pip package's, for an isolated build does not put it on PATH."""
    import ninja

    return str(Path(ninja.BIN_DIR) / "ninja")


class NinjaFile:
    """Collects rules and edges, and writes build.ninja."""

    def __init__(self) -> None:
        self.lines = ["ninja_required_version = 1.10"]

    def rule(self, name: str, command: list[str], *, depfile: bool = False) -> None:
        self.lines += [f"rule {name}", f"  command = {' '.join(command)}", f"  description = {name} $out"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def pool(self, name: str, depth: int) -> None:
        self.lines += [f"pool {name}", f"  depth = {depth}"]

    def edge(self, rule: str, output: Path, inputs: list[Path], **variables: str) -> Path:
        def escape(path: Path) -> str:
            return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

        self.lines.append(f"build {escape(output)}: {rule} {' '.join(map(escape, inputs))}")
        self.lines += [f"  {name} = {value}" for name, value in variables.items()]
        return output


class NativeBuild:
    """What is compiled, with which flags, into which folder."""

    def __init__(self, folder: Path) -> None:
        import torch
        from torch.utils.cpp_extension import include_paths

        self.folder = folder
        self.torch = torch
        self.cxx = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), "g++")
        self.torch_libs = Path(torch.__file__).parent / "lib"
        self.includes = [f"-isystem {path}" for path in include_paths()]
        self.common = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
        self.common.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}")
        self.link = [f"-L{self.torch_libs}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{self.torch_libs}"]
        self.file = NinjaFile()
        self.file.rule("cxx", [self.cxx, "-MMD -MF $out.d $flags -c $in -o $out"], depfile=True)
        self.file.rule("link", [self.cxx, "-shared $in -o $out $flags"])

    def compiler_version(self) -> str:
        text = subprocess.run([self.cxx, "--version"], capture_output=True, text=True, check=True).stdout
        return text.splitlines()[0]

    def cpu_library(self) -> Path:
        import pybind11

        flags = [
            *self.common,
            "-fopenmp",
            f"-isystem {pybind11.get_include()}",
            f"-isystem {sysconfig.get_path('include')}",
            *self.includes,
            f'-DFASTDPO_VERSION=\\"{VERSION}\\"',
            f"'-DFASTDPO_COMPILER=\"{self.compiler_version()}\"'",
        ]
        sources = sorted((ROOT / "csrc/cpu").glob("*.cpp"))
        if platform.machine() not in ("x86_64", "AMD64"):
            sources = [s for s in sources if not flags_of(s)]
        objects = [
            self.file.edge(
                "cxx", self.folder / f"cpu_{source.stem}.o", [source], flags=" ".join([*flags, *flags_of(source)])
            )
            for source in sources
        ]
        library = self.folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        return self.file.edge("link", library, objects, flags=" ".join(["-fopenmp", *self.link]))

    def cuda_library(self, toolkit: Toolkit) -> Path:
        archs = cuda_archs(toolkit)
        level1 = find_level1(archs)
        common = [
            "-std=c++20 -O3 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden -cudart static --threads 2",
            "-Xptxas -v,--warn-on-spills",
        ]
        nvcc_flags = [*common, *gencode(archs)]
        self.file.rule(
            "nvcc", [toolkit.nvcc, "-MD -MF $out.d $flags -c $in -o $out > $out.log 2>&1 || (cat $out.log; false)"]
        )
        kernels = [
            self.file.edge("nvcc", self.folder / f"cuda_{source.stem}_cu.o", [source], flags=" ".join(nvcc_flags))
            for source in sorted((ROOT / "csrc/cuda").glob("*.cu"))
        ]
        if level1.headers is not None:
            # CUTLASS checks a great deal with assert(), on the device too.
            level1_flags = [*common, "-DNDEBUG", f"-isystem {level1.headers}", *gencode([LEVEL1_ARCH])]
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            self.file.pool("level1", max(1, memory // LEVEL1_MEMORY))
            kernels += [
                self.file.edge(
                    "nvcc",
                    self.folder / f"cuda_level1_{source.stem}_cu.o",
                    [source],
                    flags=" ".join(level1_flags),
                    pool="level1",
                )
                for source in sorted((ROOT / "csrc/cuda/hopper").glob("*.cu"))
            ]
        flags = [
            *self.common,
            f"-DTORCH_TARGET_VERSION={TARGET_TORCH} -DUSE_CUDA",
            f'-DFASTDPO_NVCC=\\"{toolkit.version}\\"',
            f"'-DFASTDPO_CUDA_ARCHS=\"{' '.join(archs)}\"'",
            *([f"'-DFASTDPO_NO_LEVEL1=\"{level1.missing}\"'"] if level1.missing else []),
            f"-isystem {toolkit.home / 'include'}",
            *self.includes,
        ]
        binding = [
            self.file.edge("cxx", self.folder / f"cuda_{source.stem}.o", [source], flags=" ".join(flags))
            for source in sorted((ROOT / "csrc/cuda").glob("*.cpp"))
        ]
        # torch's CUDA library is named as needed but not linked against: the loader finds it in a torch with CUDA, and
        # this machine's torch need not have it.
        empty = self.folder / "empty.cpp"
        if not empty.is_file():  # a new one would have everything linked again
            empty.write_text("")
        stub = self.file.edge(
            "link", self.folder / "libtorch_cuda.so", [empty], flags="-Wl,-soname,libtorch_cuda.so -nostdlib"
        )
        library = self.folder / "fastdpo_cuda.so"
        cudart = (
            f"-L{toolkit.home}/lib64 -L{toolkit.home}/lib -lcudart_static -ldl -lrt -lpthread -Wl,--exclude-libs,ALL"
        )
        needed = f"-Wl,--no-as-needed {stub} -Wl,--as-needed"
        self.file.edge("link", library, [*binding, *kernels], flags=" ".join([cudart, needed, *self.link[:-1]]))
        self.file.lines[-2] += f" | {stub}"
        return library

    def run(self) -> None:
        build_file = self.folder / "build.ninja"
        # ninja keeps its log in builddir.
        build_file.write_text("\n".join([f"builddir = {self.folder}", *self.file.lines]) + "\n")
        jobs = os.environ.get("MAX_JOBS")
        subprocess.run([ninja_path(), "-f", build_file, *(["-j", jobs] if jobs else [])], check=True)


def level1_fact(toolkit: Toolkit | None) -> str:
    missing = find_level1(cuda_archs(toolkit)).missing if toolkit is not None else "there was no nvcc"
    return "built" if missing is None else f"not built: {missing}"


class BuildNative(build_ext):
    """setuptools' build_ext, with ninja for a compiler."""

    def run(self) -> None:
        import torch

        tag = f"{sys.implementation.cache_tag}-torch{torch.__version__}"
        folder = ROOT / "build" / tag
        folder.mkdir(parents=True, exist_ok=True)
        build = NativeBuild(folder)
        libraries = [build.cpu_library()]
        toolkit = find_toolkit()
        if toolkit is not None:
            libraries.append(build.cuda_library(toolkit))
        build.run()
        in_place = self.inplace or self.editable_mode
        destination = ROOT / "fastdpo" if in_place else Path(self.build_lib) / "fastdpo"
        destination.mkdir(parents=True, exist_ok=True)
        for library in libraries:
            # A new file, not new content: a process that has the old one mapped keeps it.
            (destination / library.name).unlink(missing_ok=True)
            shutil.copy2(library, destination / library.name)
        facts = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "library": libraries[0].name,
            "cuda_archs": cuda_archs(toolkit) if toolkit else [],
            "nvcc": toolkit.version if toolkit else None,
            "cuda_level1": level1_fact(toolkit),
        }
        (destination / "_build.json").write_text(json.dumps(facts) + "\n")

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


if __name__ == "__main__":
    setup(ext_modules=[Extension("fastdpo._C", sources=[])], cmdclass={"build_ext": BuildNative})
