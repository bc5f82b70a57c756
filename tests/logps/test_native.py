"""Loading the compiled libraries: what they tell of themselves, and what a user reads when they do not fit."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastdpo
from fastdpo.logps import native as _native
from fastdpo.logps.builds import minor

PACKAGE = Path(fastdpo.__file__).parent


def test_build_info() -> None:
    info = fastdpo.build_info()
    assert info["version"] == fastdpo.__version__
    assert info["torch_running"] == torch.__version__
    assert info["torch_built_against"] == torch.__version__.split("+")[0]
    assert info["cpu_library"] == f"fastdpo_cpu_torch{minor(torch.__version__)}.so"
    assert torch.__version__ in info["cpu_libraries"]
    assert info["cpu_path"] in ("avx512_bf16", "avx512", "avx2", "plain")
    fused = info["cpu_path"] != "plain"
    assert info["cpu_products"]["float64"] == "at::mm in chunks"
    assert info["cpu_products"]["float32"] == ("fused, float32 operands" if fused else "at::mm in chunks")
    assert (info["cpu_products"]["bfloat16"] == "fused, bfloat16 operands") == (info["cpu_path"] == "avx512_bf16")
    assert re.search(r"\d+\.\d+", info["compiler"])
    built = (PACKAGE / "fastdpo_cuda.so").is_file()
    assert bool(info["cuda_archs"]) == built
    assert set(info["cuda_archs"]) <= {"8.0", "8.6", "8.9", "9.0a", "10.0", "12.0"}
    loaded = "loaded" if torch.version.cuda else "built, not loaded: this torch has no CUDA"
    assert info["cuda_library"] == (loaded if built else "not built")
    assert info["cuda_level1"] == "built" or info["cuda_level1"].startswith("not built: ")
    assert built or info["cuda_level1"] == "not built: there was no nvcc"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package's Python files alone, as a checkout that was never built."""
    target = tmp_path / "fastdpo"
    libraries = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    shutil.copytree(PACKAGE, target, ignore=libraries)
    return target


SCORE = """
import sys, warnings
sys.path.insert(0, sys.argv[1])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from fastdpo import build_info, token_logps
import torch
logps = token_logps(torch.ones(2, 3), torch.zeros(4, 3, requires_grad=True), torch.tensor([1, -100])).logps
logps.sum().backward()
assert logps.tolist() == [-torch.log(torch.tensor(4.0)), 0.0] and build_info()["cpu_path"] == "portable"
print(*(str(warning.message) for warning in caught), sep="\\n")
"""


def said_at_import(copy: Path) -> str:
    """The warnings, of a copy that scores tokens all the same."""
    done = subprocess.run([sys.executable, "-c", SCORE, str(copy.parent)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_without_the_extension_says_how_to_build_it(copy: Path) -> None:
    assert said_at_import(copy) == (
        "CPU tensors go through plain PyTorch, which is right and slower: fastdpo's compiled extension is missing: "
        "build it with `pip install --no-build-isolation -e .` in fastdpo's source folder."
    )


def write_facts(copy: Path, **cpu: str) -> None:
    facts = json.loads((PACKAGE / "_build.json").read_text())
    (copy / "_build.json").write_text(json.dumps(facts | {"wheel": False, "cpu": cpu}))


def own_library() -> Path:
    facts = json.loads((PACKAGE / "_build.json").read_text())
    return PACKAGE / facts["cpu"][torch.__version__]


def test_import_under_another_torch_says_so_and_how_to_rebuild(copy: Path) -> None:
    """Also where its library is there: it is not tried."""
    shutil.copy2(own_library(), copy)
    write_facts(copy, **{"2.10.0": own_library().name})
    message = said_at_import(copy)
    assert "built for torch 2.10.0" in message
    assert f"this is torch {torch.__version__}" in message
    assert "rebuild it with `pip install --no-build-isolation -e .`" in message


def test_the_library_of_this_torch_is_found_among_others(copy: Path) -> None:
    shutil.copy2(own_library(), copy)
    shutil.copy2(own_library(), copy / "other.so")
    write_facts(copy, **{"2.10.0": "other.so", torch.__version__.split("+")[0]: own_library().name})
    code = "import sys; sys.path.insert(0, sys.argv[1]); import fastdpo; print(fastdpo.build_info()['cpu_library'])"
    command = [sys.executable, "-W", "error", "-c", code, str(copy.parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.strip() == own_library().name, done.stderr


def test_a_library_that_torch_does_not_take_is_done_without(copy: Path) -> None:
    """A torch that was compiled otherwise than its release: the loader's words are handed on."""
    (copy / "broken.so").write_bytes(b"no library")
    write_facts(copy, **{torch.__version__: "broken.so"})
    message = said_at_import(copy)
    assert f"broken.so cannot be loaded with torch {torch.__version__}: " in message
    assert "too short" in message or "invalid ELF header" in message


def test_schemas_are_the_libraries() -> None:
    """They stand in csrc/fastdpo.h, and in Python for where there is no library."""
    ops = (torch.ops.fastdpo.token_logps_forward, torch.ops.fastdpo.token_logps_backward)
    for schema, op in zip(_native._SCHEMAS, ops, strict=True):
        assert torch._C.parse_schema(f"fastdpo::{schema}") == op.default._schema
        assert torch.Tag.pt2_compliant_tag in op.default.tags


def test_import_needs_torch_alone() -> None:
    """Who drops the loss into a loop of their own does not wait for transformers."""
    others = ["transformers", "datasets", "accelerate", "peft"]
    code = f"import sys, fastdpo; print([m for m in {others} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("nvcc", "driver", "knows"),
    [("13.0", 12080, "12.8"), ("13.0", 13000, None), ("12.6", 13010, None), ("13.0", 0, None)],
)
def test_a_driver_that_is_older_than_the_library(nvcc: str, driver: int, knows: str | None) -> None:
    said = _native.driver_misfit(nvcc, driver)
    assert (said is None) == (knows is None)
    assert knows is None or f"built with CUDA 13.0, and this machine's driver knows {knows}: update" in said
