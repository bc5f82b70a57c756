"""The CUDA library as a file: what it needs, what it exports, and that torch takes it. No GPU or CUDA torch needed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import pytest
import torch

import fastdpo

LIBRARY = Path(__file__).parents[2] / "fastdpo" / "fastdpo_cuda.so"

pytestmark = pytest.mark.skipif(
    not LIBRARY.is_file(), reason=f"{LIBRARY.name} is not there: fastdpo was built on a machine without nvcc"
)

# Stands in for the libtorch_cuda.so of a CUDA torch, which this torch need not have: what the library takes from it.
STAND_IN = """
extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }
extern "C" int torch_get_current_cuda_blas_handle(void**) { return 1; }
"""

CHECK = """
import ctypes, json, sys
import torch

if len(sys.argv) > 2:
    ctypes.CDLL(sys.argv[2], mode=ctypes.RTLD_GLOBAL)
torch.ops.load_library(sys.argv[1])
library = ctypes.CDLL(sys.argv[1])
library.fastdpo_cuda_build_facts.restype = ctypes.c_char_p
names = ["token_logps_forward", "token_logps_backward"]
statuses = [library.fastdpo_declare_ops(), library.fastdpo_declare_ops()]
print(json.dumps({
    "facts": json.loads(library.fastdpo_cuda_build_facts()),
    "statuses": statuses,
    "kernels": [torch._C._dispatch_has_kernel_for_dispatch_key(f"fastdpo::{name}", "CUDA") for name in names],
    "schemas": [str(getattr(torch.ops.fastdpo, name).default._schema) for name in names],
}))
"""


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments that bring a libtorch_cuda.so; none where torch has its own."""
    if torch.version.cuda is not None:
        return []
    folder = tmp_path_factory.mktemp("stand_in")
    (folder / "stand_in.cpp").write_text(STAND_IN)
    library = folder / "libtorch_cuda.so"
    compiler = os.environ.get("CXX", "g++")
    command = [compiler, "-shared", "-fPIC", str(folder / "stand_in.cpp"), "-o", str(library)]
    subprocess.run([*command, "-Wl,-soname,libtorch_cuda.so"], check=True)
    return [str(library)]


def test_torch_takes_the_library_alone(stand_in: list[str]) -> None:
    command = [sys.executable, "-c", textwrap.dedent(CHECK), str(LIBRARY), *stand_in]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["statuses"] == [0, 0]
    assert found["kernels"] == [True, True]
    assert found["schemas"][0].startswith("fastdpo::token_logps_forward(Tensor hidden, Tensor weight, Tensor targets")
    assert found["schemas"][1].startswith("fastdpo::token_logps_backward(Tensor grad_logps, Tensor hidden")
    assert found["facts"]["archs"] and found["facts"]["nvcc"] and found["facts"]["target_torch"] == "2.10"
    assert found["facts"]["level1"] == fastdpo.build_info()["cuda_level1"]


def test_declaring_ops_that_are_there_already_is_refused_and_harmless(stand_in: list[str]) -> None:
    check = """
    import ctypes, sys
    import torch

    if len(sys.argv) > 2:
        ctypes.CDLL(sys.argv[2], mode=ctypes.RTLD_GLOBAL)
    there = torch.library.Library("fastdpo", "FRAGMENT")
    there.define("token_logps_forward(Tensor x) -> Tensor")
    torch.ops.load_library(sys.argv[1])
    print(ctypes.CDLL(sys.argv[1]).fastdpo_declare_ops())
    """
    command = [sys.executable, "-c", textwrap.dedent(check), str(LIBRARY), *stand_in]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1"]


def test_exports_and_needs() -> None:
    """Two C functions out; no CUDA runtime of its own for others to find, and none but torch's libraries in."""
    symbols = subprocess.run(["nm", "-D", "--defined-only", LIBRARY], capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1].split("@")[0] for line in symbols.splitlines()}
    assert {"fastdpo_declare_ops", "fastdpo_cuda_build_facts"} <= names
    assert not [name for name in names if name.startswith(("cuda", "__cuda", "cu"))]
    dynamic = subprocess.run(["readelf", "-d", LIBRARY], capture_output=True, text=True, check=True).stdout
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line}
    assert "libtorch_cuda.so" in needed
    # Nor the driver, which a machine without a GPU does not have: what Level 1 needs of it is asked for at run time.
    assert not [name for name in needed if name.startswith(("libcudart", "libcublas", "libpython", "libcuda."))]


def cuobjdump() -> str:
    """The tool's path; CUDA's own, or the one that comes with triton."""
    of_triton = importlib.util.find_spec("triton")
    folders = [Path(of_triton.origin).parent / "backends/nvidia/bin"] if of_triton is not None else []
    found = shutil.which("cuobjdump") or next((str(f / "cuobjdump") for f in folders if f.is_dir()), None)
    if found is None:
        pytest.skip("there is no cuobjdump")
    return found


def test_level_1_as_it_was_compiled() -> None:
    """Tensor cores fed by TMA, exponentials on the accumulators, no register in memory, no logits written."""
    built = fastdpo.build_info()["cuda_level1"]
    if built != "built":
        pytest.skip(f"Level 1 was {built}")
    command = [cuobjdump(), "-sass", "-arch", "sm_90a", LIBRARY]  # the one that has it
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = [text for text in re.split(r"^\s*Function : ", code, flags=re.M) if "ExponentialTile" in text.split()[0]]
    assert len(kernels) == 5
    writing, with_extras = 0, 0
    for kernel in kernels:
        counts = Counter(re.findall(r"^\s*/\*\w+\*/\s+(?:@!?\w+\s+)?([A-Z]\w+)", kernel, flags=re.M))
        assert counts["HGMMA"] and counts["UTMALDG"]
        # A thread's accumulators of a tile of 128 x 192 are 192, and its rows are 4.
        assert counts["MUFU"] >= 192 and counts["STG"] == 4
        assert not counts["STL"] and not counts["LDL"]
        writing += counts["UTMASTG"] > 0
        with_extras += "ExponentialTileILi128ELi192ELb1E" in kernel.split()[0]
        assert (counts["STSM"] > 0) == (counts["UTMASTG"] > 0)
    assert (writing, with_extras) == (2, 2)
