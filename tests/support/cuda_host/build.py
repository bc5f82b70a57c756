"""Compiles the CUDA sources for the host, so that they are tested where no GPU is.

The same csrc/cuda/*.cuh, *.cu and *.cpp that nvcc and g++ build for a device; replaced are the CUDA language
(cuda_shim.h), cuBLAS (products_host.cpp), Level 1's product (exponentials_host.cpp), the CUDA runtime
(runtime_host.cpp) and the registration (binding_host.cpp).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

HERE = Path(__file__).resolve().parent
CUDA = HERE.parents[2] / "csrc" / "cuda"
REPLACED = ("runtime", "products", "exponentials", "binding")
SOURCES = [
    *sorted(CUDA.glob("*.cu")),
    *(source for source in sorted(CUDA.glob("*.cpp")) if source.stem not in REPLACED),
    *(HERE / f"{name}_host.cpp" for name in REPLACED),
]


def compile_flags(block_threads: int) -> list[str]:
    return [
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-fvisibility=hidden",
        "-Wall",
        "-Wextra",
        "-Wno-unknown-pragmas",
        "-Wno-unused-parameter",
        f"-DFASTDPO_BLOCK_THREADS={block_threads}",
        "-DFASTDPO_TILE_COLUMNS=16",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        f"-I{HERE}",
        f"-I{CUDA}",
        *(f"-isystem{path}" for path in include_paths()),
    ]


def build(folder: Path, block_threads: int = 64) -> Path:
    """Returns the library, from ``folder`` where the same sources were built there with the same flags before."""
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes that start together build it once
        return _build(folder, block_threads)


def _build(folder: Path, block_threads: int) -> Path:
    compiler = os.environ.get("CXX", "g++")
    flags = compile_flags(block_threads)
    headers = [*CUDA.glob("*.h"), *CUDA.glob("*.cuh"), *HERE.glob("*.h"), CUDA.parent / "fastdpo.h"]
    key = hashlib.sha256(" ".join([compiler, *flags, torch.__version__]).encode())
    for path in [*SOURCES, *sorted(headers)]:
        key.update(path.read_bytes())
    library = folder / f"fastdpo_cuda_host_{key.hexdigest()[:16]}.so"
    if library.is_file():
        return library

    objects = folder / f"objects_{os.getpid()}"
    objects.mkdir(parents=True)

    def compile_one(source: Path) -> Path:
        target = objects / f"{source.name}.o"
        _run([compiler, *flags, "-c", "-x", "c++", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        compiled = list(pool.map(compile_one, SOURCES))
    torch_libraries = Path(torch.__file__).parent / "lib"
    unfinished = objects / library.name
    _run(
        [
            compiler,
            "-shared",
            *map(str, compiled),
            "-o",
            str(unfinished),
            f"-L{torch_libraries}",
            "-ltorch",
            "-ltorch_cpu",
            "-lc10",
            f"-Wl,-rpath,{torch_libraries}",
        ]
    )
    unfinished.replace(library)
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    print(build(Path(sys.argv[1])))
