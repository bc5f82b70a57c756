"""The native libraries: which files they are made of, and with which flags.

The CPU library fits one minor release of torch, since oneDNN's micro-kernel is ATen's alone; there may be one for each
of several. The CUDA library is built against LibTorch's stable ABI, and one serves every torch from 2.10 on; it is
built whether or not a torch has CUDA. Neither has anything of Python in it, so that both serve every version of that.

The CUDA library's Level 1, a product of our own for Hopper, is built where CUTLASS's headers are.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from building import glibc
from building.ninja import ROOT, NinjaFile, from_root
from building.toolkit import LEVEL1_ARCH, Toolkit, cuda_archs, find_level1, gencode, own_gpus
from building.torch_tree import TorchTree

VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M).group(1)
CUDA_LIBRARY = "fastdpo_cuda.so"
# The oldest torch whose stable ABI the CUDA library asks for: 2.10, as torch encodes it.
TARGET_TORCH = "0x020a000000000000"
# What compiling one of Level 1's kernels takes, with room.
LEVEL1_MEMORY = 6 << 30
# The CPU library's files that know nothing of torch, by how their names begin: compiled once for all releases.
TORCH_FREE = ("isa", "row_kernels", "tile_kernels")


def cpu_library_name(torch: TorchTree) -> str:
    return f"fastdpo_cpu_torch{torch.minor}.so"


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


class NativeBuild:
    """What is compiled into ``folder``; ``portable`` libraries ask for no younger glibc than torch's wheels do."""

    def __init__(self, folder: Path, *, portable: bool = False) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.cxx = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), "g++")
        self.common = ["-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unused-parameter"]
        self.stand_ins = glibc.stand_ins(folder / "glibc", self.cxx) if portable else []
        # A library that was linked otherwise is another file.
        self.linked = folder / ("portable" if portable else "native")
        self.linked.mkdir(exist_ok=True)
        self.file = NinjaFile()
        self.file.rule("cxx", [self.cxx, "-MMD -MF $out.d $flags -c $in -o $out"], depfile=True)
        self.file.rule("link", [self.cxx, "-shared $in -o $out $flags"])
        self.made: set[Path] = set()

    def compiler_version(self) -> str:
        text = subprocess.run([self.cxx, "--version"], capture_output=True, text=True, check=True).stdout
        return text.splitlines()[0]

    def of_torch(self, torch: TorchTree) -> list[str]:
        """The flags to compile against a torch; messages name its headers as if they lay in torch/include."""
        return [
            *self.common,
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.cxx11_abi)}",
            *(f"-isystem {from_root(path)}" for path in torch.includes),
            f"-ffile-prefix-map={from_root(torch.includes[0])}=torch/include",
        ]

    def link(self, name: str, objects: Sequence[Path], needs: Sequence[str], flags: Sequence[str] = ()) -> Path:
        """Torch's libraries (``needs``) are named but not linked against, nor is a folder of theirs: whoever loads the
        library has imported torch, and any build of it will do, also one that this machine has not got."""
        first = [*self.stand_ins, *(self._stub(need) for need in needs)]
        named = f"-Wl,--no-as-needed {' '.join(str(from_root(path)) for path in first)} -Wl,--as-needed"
        return self.file.edge("link", self.linked / name, objects, after=first, flags=" ".join([*flags, named]))

    def _stub(self, soname: str) -> Path:
        exported = glibc.OF_TORCH if self.stand_ins and soname == "libtorch_cpu.so" else ()
        source, text = self.linked / f"{soname}.cpp", "".join(f'extern "C" void {name}() {{}}\n' for name in exported)
        if not source.is_file() or source.read_text() != text:  # a new one would have everything linked again
            source.write_text(text)
        flags = f"-fPIC -Wl,-soname,{soname} -nostdlib"
        return self._once("link", self.linked / "stubs" / soname, source, flags)

    def _once(self, rule: str, target: Path, source: Path, flags: str) -> Path:
        """An edge that several libraries share."""
        if target not in self.made:
            self.made.add(target)
            self.file.edge(rule, target, [source], flags=flags)
        return target

    def cpu_library(self, torch: TorchTree) -> Path:
        sources = sorted((ROOT / "csrc/cpu").glob("*.cpp"))
        if platform.machine() not in ("x86_64", "AMD64"):
            sources = [s for s in sources if not flags_of(s)]
        objects = [self._cpu_object(source, torch) for source in sources]
        # Not -fopenmp: the functions are found in the OpenMP that torch has brought, of which there is to be one.
        return self.link(cpu_library_name(torch), objects, ["libtorch_cpu.so", "libc10.so"])

    def _cpu_object(self, source: Path, torch: TorchTree) -> Path:
        if source.stem.startswith(TORCH_FREE):
            flags = " ".join([*self.common, *flags_of(source)])
            return self._once("cxx", self.folder / "cpu" / f"{source.stem}.o", source, flags)
        flags = [*self.of_torch(torch), "-fopenmp"]
        if source.stem == "binding":
            flags += [f'-DFASTDPO_VERSION=\\"{VERSION}\\"', f"'-DFASTDPO_COMPILER=\"{self.compiler_version()}\"'"]
        target = self.folder / f"cpu_torch{torch.version}" / f"{source.stem}.o"
        return self.file.edge("cxx", target, [source], flags=" ".join(flags))

    def cuda_library(self, toolkit: Toolkit, torch: TorchTree) -> Path:
        """``torch`` lends its headers, of whatever release it is."""
        archs = cuda_archs(toolkit)
        level1 = find_level1(archs)
        objects = self.folder / "cuda"
        common = [
            "-std=c++20 -O3 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden -cudart static --threads 2",
            "-Xptxas -v,--warn-on-spills",
        ]
        command = "-MD -MF $out.d $flags -c $in -o $out > $out.log 2>&1 || (cat $out.log; false)"
        self.file.rule("nvcc", [toolkit.nvcc, command], depfile=True)
        flags = " ".join([*common, *gencode(archs)])
        kernels = [
            self.file.edge("nvcc", objects / f"{source.stem}_cu.o", [source], flags=flags)
            for source in sorted((ROOT / "csrc/cuda").glob("*.cu"))
        ]
        if level1.headers is not None:
            # CUTLASS checks a great deal with assert(), on the device too.
            headers = f"-isystem {from_root(level1.headers)}"
            flags = " ".join([*common, "-DNDEBUG", headers, *gencode([LEVEL1_ARCH])])
            memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            self.file.pool("level1", max(1, memory // LEVEL1_MEMORY))
            kernels += [
                self.file.edge("nvcc", objects / f"level1_{source.stem}_cu.o", [source], flags=flags, pool="level1")
                for source in sorted((ROOT / "csrc/cuda/hopper").glob("*.cu"))
            ]
        flags = " ".join(
            [
                *self.of_torch(torch),
                f"-DTORCH_TARGET_VERSION={TARGET_TORCH} -DUSE_CUDA",
                f'-DFASTDPO_NVCC=\\"{toolkit.version}\\"',
                f"'-DFASTDPO_CUDA_ARCHS=\"{' '.join(archs)}\"'",
                *([f"'-DFASTDPO_NO_LEVEL1=\"{level1.missing}\"'"] if level1.missing else []),
                f"-isystem {toolkit.home / 'include'}",
            ]
        )
        binding = [
            self.file.edge("cxx", objects / f"{source.stem}.o", [source], flags=flags)
            for source in sorted((ROOT / "csrc/cuda").glob("*.cpp"))
        ]
        cudart = f"-L{toolkit.home}/lib64 -L{toolkit.home}/lib -lcudart_static -ldl -lrt -lpthread"
        needs = ["libtorch_cuda.so", "libtorch_cpu.so", "libc10.so"]
        return self.link(CUDA_LIBRARY, [*binding, *kernels], needs, [cudart, "-Wl,--exclude-libs,ALL"])

    def run(self, toolkit: Toolkit | None = None) -> None:
        self.file.run(self.folder, lambda waiting: advice(toolkit, waiting))


def advice(toolkit: Toolkit | None, waiting: Sequence[str]) -> str | None:
    """How to wait for less, where kernels are compiled for GPUs."""
    if toolkit is None or not any(name.endswith(".cu") for name in waiting):
        return None
    archs = cuda_archs(toolkit)
    said = f"this takes some minutes, once: the kernels are compiled for compute capability {', '.join(archs)}"
    gpus = own_gpus()
    if len(archs) > 1 and set(gpus) != {arch.rstrip("a") for arch in archs}:
        own = f"TORCH_CUDA_ARCH_LIST={';'.join(gpus)!r}" if gpus else "TORCH_CUDA_ARCH_LIST=9.0 (an H100's, say)"
        said += f"; for your own GPU alone, set {own}"
    return said
