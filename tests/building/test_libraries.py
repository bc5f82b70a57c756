"""The libraries as files: what they ask for, of whom, and what they tell of the machine that they were made on."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastdpo
from building import glibc, libraries
from building.contents import local_paths, members
from building.libraries import NativeBuild
from building.ninja import ROOT
from building.toolkit import Toolkit, cuda_archs
from building.torch_tree import running

PACKAGE = Path(fastdpo.__file__).parent
LIBRARIES = sorted(PACKAGE.glob("*.so"))


def dynamic(library: Path) -> str:
    return subprocess.run(["readelf", "-dW", library], capture_output=True, text=True, check=True).stdout


def test_there_is_a_cpu_library() -> None:
    assert any(library.name.startswith("fastdpo_cpu_torch") for library in LIBRARIES)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_no_library_names_the_machine_that_it_was_made_on(library: Path) -> None:
    """In no message, and in no folder to search for others."""
    assert local_paths(library.read_bytes(), [ROOT, Path(sys.prefix), Path(sys.base_prefix), Path.home()]) == []
    assert "RPATH" not in dynamic(library) and "RUNPATH" not in dynamic(library)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_no_library_has_python_or_an_openmp_of_its_own(library: Path) -> None:
    """One serves every Python, and there is one OpenMP in the process, torch's."""
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic(library))
    assert {"libtorch_cpu.so", "libc10.so"} <= set(needed)
    assert not [name for name in needed if re.match("libpython|libgomp|libomp|libiomp|libtorch_python", name)]
    symbols = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    assert not re.search(r" U _?Py", symbols.stdout)


def test_paths_are_found() -> None:
    folders = [Path("/build/here")]
    assert local_paths(b"\0ok csrc/cpu/mm.cpp torch/include/c10/util.h\0/dev/shm/x\0/tmp\0", folders) == []
    assert local_paths(b"\0in /build/here\0\0at /usr/lib/x/y.h:3\0", folders) == [
        "in /build/here",
        "at /usr/lib/x/y.h:3",
    ]


def test_members_of_a_wheel(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("fastdpo/a.so", b"/root/a.cpp")
    assert dict(members(tmp_path / "a.whl")) == {"fastdpo/a.so": b"/root/a.cpp"}


def test_the_functions_of_an_earlier_glibc_are_taken(tmp_path: Path) -> None:
    """With functions of which this machine's glibc has younger versions, if it is young enough."""
    source = tmp_path / "a.cpp"
    source.write_text(
        "#include <dlfcn.h>\n#include <cmath>\n#include <memory>\n#include <thread>\n"
        'extern "C" double f(double x, std::shared_ptr<int>& p) {\n'
        '  std::thread([copy = p] { dlopen("x", RTLD_NOW); }).join();\n  return std::exp(x) + std::log(x);\n}\n'
    )
    first = glibc.stand_ins(tmp_path / "glibc", "g++")
    target = tmp_path / "a.so"
    stand_ins = ["-Wl,--no-as-needed", *map(str, first)]
    subprocess.run(["g++", "-O2", "-fPIC", "-shared", str(source), *stand_ins, "-o", target], check=True)
    command = ["readelf", "--dyn-syms", "--wide", str(target)]
    symbols = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    asked = {tuple(map(int, version.split("."))) for version in re.findall(r"@GLIBC_([\d.]+)", symbols)}
    assert asked and max(asked) <= glibc.GLIBC
    assert re.search(r"UND exp@GLIBC", symbols)  # not left open
    # And they are the real library's when it is loaded.
    code = (
        "import ctypes, sys; ctypes.CDLL('libstdc++.so.6', mode=ctypes.RTLD_GLOBAL); f = ctypes.CDLL(sys.argv[1]).f; "
        "f.restype = ctypes.c_double; print(f(ctypes.c_double(1.0), ctypes.byref((ctypes.c_void_p * 2)())))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(target)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2.718281828459045"


def test_which_version_of_a_symbol_is_taken() -> None:
    line = "   12: 0000000000001000    7 {}    GLOBAL DEFAULT   15 {}"
    names = ["dlopen@@GLIBC_2.34", "dlopen@GLIBC_2.2.5", "dlopen@GLIBC_2.30", "exp@@GLIBC_2.27", "exp@GLIBC_2.2.5"]
    names += ["arc4random@@GLIBC_2.36", "pow@GLIBC_2.2.5", "pow@GLIBC_2.10", "pow@@GLIBC_2.29", "gone@GLIBC_2.2.5"]
    symbols = [line.format("FUNC", name) for name in names] + [line.format("OBJECT", "stderr@@GLIBC_2.2.5")]
    assert glibc.versions_to_take("\n".join(symbols)) == {
        "dlopen": "GLIBC_2.2.5",
        "exp": "GLIBC_2.27",
        "arc4random": "GLIBC_2.36",  # there was none before
        "pow": "GLIBC_2.10",
        "stderr": "GLIBC_2.2.5",
    }


def test_what_a_compiler_says_of_headers_is_read(tmp_path: Path) -> None:
    """Otherwise a library keeps the kernels of a header that has changed since."""
    build = NativeBuild(tmp_path)
    build.cpu_library(running())
    build.cuda_library(Toolkit("nvcc", "13.0", Path("/toolkit")), running())
    rules = "\n".join(build.file.lines).split("rule ")[1:]
    compiling = {rule.split("\n")[0]: "depfile = $out.d" in rule for rule in rules if " -c $in" in rule}
    assert compiling == {"cxx": True, "nvcc": True}


def test_who_waits_for_kernels_is_told_how_to_wait_for_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    cuda_archs.cache_clear()
    toolkit = Toolkit("nvcc", "13.0", Path("/toolkit"))
    waiting = ["csrc/cpu/isa.cpp", "csrc/cuda/row_kernel.cu"]
    for gpus, said in (
        ([], "set TORCH_CUDA_ARCH_LIST=9.0 (an H100's, say)"),
        (["8.9"], "set TORCH_CUDA_ARCH_LIST='8.9'"),
    ):
        monkeypatch.setattr(libraries, "own_gpus", lambda gpus=gpus: gpus)
        assert libraries.advice(toolkit, waiting).endswith(f"for your own GPU alone, {said}")
    assert libraries.advice(toolkit, waiting[:1]) is None and libraries.advice(None, waiting) is None
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.9")
    cuda_archs.cache_clear()
    assert libraries.advice(toolkit, waiting).endswith("compiled for compute capability 8.9")
    cuda_archs.cache_clear()
