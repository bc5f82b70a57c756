"""Loads the compiled ops, checks that they fit the running torch, and gives them shape functions (fake tensors)."""

from __future__ import annotations

import ctypes
import importlib
import json
import platform
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FOLDER = Path(__file__).parents[1]  # the package, beside whose files the libraries are built
_CUDA_LIBRARY = _FOLDER / "fastdpo_cuda.so"
_REBUILD = "pip install --no-build-isolation -e ."


def _read_build_file() -> dict[str, Any] | None:
    """What the build wrote beside the libraries; None if nothing was built here."""
    file = _FOLDER / "_build.json"
    return json.loads(file.read_text()) if file.is_file() else None


def _cpu_misfit(built: dict[str, Any] | None) -> str | None:
    """Why the CPU library cannot be used here; None if it can."""
    if built is None:
        return f"fastdpo's compiled extension is missing: build it with `{_REBUILD}` in fastdpo's source folder."
    if built["torch"] != torch.__version__ or not (_FOLDER / built["library"]).is_file():
        return (
            f"fastdpo was built for torch {built['torch']} and Python {built['python']}, but this is torch "
            f"{torch.__version__} and Python {platform.python_version()}: rebuild it with `{_REBUILD}` in fastdpo's "
            "source folder."
        )
    return None


def _load() -> dict[str, Any]:
    """Loads what fits; returns the facts of what was loaded."""
    build_file = _read_build_file()
    misfit = _cpu_misfit(build_file)
    cuda_fits = torch.version.cuda is not None and _CUDA_LIBRARY.is_file()
    if misfit is not None and not cuda_fits:
        raise ImportError(misfit)

    facts: dict[str, Any] = {"torch_running": torch.__version__, "cpu_path": None}
    facts |= {name: (build_file or {}).get(name) for name in ("cuda_archs", "nvcc", "cuda_level1")}
    if misfit is None:
        built = importlib.import_module("fastdpo._C").build_facts()
        facts |= {
            "version": built["version"],
            "compiler": built["compiler"],
            "torch_built_against": built["torch"],
            "cpu_path": built["cpu_path"],
        }
    if torch.version.cuda is not None and not _CUDA_LIBRARY.is_file():
        warnings.warn(
            f"fastdpo was built without nvcc, so CUDA tensors are refused; rebuild it where nvcc is: `{_REBUILD}`",
            stacklevel=3,
        )
    facts["cuda_library"] = "not built"
    if cuda_fits:
        facts |= _load_cuda(declare=misfit is not None)
    elif _CUDA_LIBRARY.is_file():
        facts["cuda_library"] = "built, not loaded: this torch has no CUDA"
    if misfit is not None:
        warnings.warn(f"CPU tensors are refused: {misfit}", stacklevel=3)
    return facts


def _load_cuda(*, declare: bool) -> dict[str, Any]:
    """What the CUDA library says of itself; with ``declare``, has it declare the ops that the CPU library would."""
    torch.ops.load_library(str(_CUDA_LIBRARY))
    library = ctypes.CDLL(str(_CUDA_LIBRARY))
    if declare and library.fastdpo_declare_ops():
        raise ImportError(
            f"torch {torch.__version__} refused the ops of {_CUDA_LIBRARY.name}: rebuild it with `{_REBUILD}`"
        )
    library.fastdpo_cuda_build_facts.restype = ctypes.c_char_p
    built = json.loads(library.fastdpo_cuda_build_facts())
    if problem := _driver_misfit(built["nvcc"], getattr(torch._C, "_cuda_getDriverVersion", int)()):
        warnings.warn(problem, stacklevel=4)
    return {
        "cuda_archs": built["archs"].split(),
        "nvcc": built["nvcc"],
        "cuda_level1": built["level1"],
        "cuda_library": "loaded",
    }


def _driver_misfit(nvcc: str, driver: int) -> str | None:
    """Why a library of this nvcc's does not run on a driver for CUDA ``driver`` (12080 is 12.8; 0: there is none)."""
    if driver == 0 or driver // 1000 >= int(nvcc.split(".")[0]):
        return None
    known = f"{driver // 1000}.{driver % 1000 // 10}"
    return (
        f"CUDA tensors will be refused: fastdpo was built with CUDA {nvcc}, and this machine's driver knows {known}. "
        f"Update the driver, or rebuild fastdpo with a toolkit that it knows (CUDA_HOME=…; {_REBUILD})"
    )


_FACTS = _load()


def build_info() -> dict[str, Any]:
    """How fastdpo was built and what of it is in use here.

    Returns:
        A dict with ``version``, ``compiler``, ``torch_built_against``, ``torch_running``, ``cpu_path``
        (``avx512_bf16``, ``avx512``, ``avx2`` or ``plain``, chosen for this processor, or by the environment variable
        FASTDPO_CPU_PATH), ``cpu_products`` (per dtype of the inputs: the fused kernels with operands of which type, or
        ``at::mm in chunks``), both None where only the CUDA library fits, the CUDA library's ``cuda_archs`` (compute
        capabilities compiled), ``nvcc`` (its version) and ``cuda_level1`` (whether it has Level 1, a product of our own
        for Hopper, or why not), and ``cuda_library``, whether that is loaded.
    """
    has_cpu = _FACTS["cpu_path"] is not None
    return _FACTS | {"cpu_products": importlib.import_module("fastdpo._C").cpu_products() if has_cpu else None}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """C of csrc/fastdpo.h: what results of inputs of this dtype are computed and summed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def operand_dtype(dtype: torch.dtype) -> torch.dtype:
    """O of csrc/fastdpo.h: what is retained of inputs of this dtype."""
    return torch.float32 if dtype == torch.float16 else dtype


@torch.library.register_fake("fastdpo::token_logps_forward")  # type: ignore[untyped-decorator]
def _forward_shapes(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    *,
    ignore_index: int,
    num_scored: int,
    logit_scale: float,
    softcap: float,
    temperature: float,
    need_direction: bool,
    retain_bytes: int,
    entropy: bool,
    log_sum_sq_probs: bool,
    mean_logits: bool,
    top_gap: bool,
) -> tuple[Tensor, ...]:
    n, h = hidden.shape
    v = weight.shape[0]
    compute, operand = compute_dtype(hidden.dtype), operand_dtype(hidden.dtype)
    retained = torch.sym_min(n, max(retain_bytes, 0) // (v * operand.itemsize))
    return (
        hidden.new_empty((n,), dtype=compute),
        hidden.new_empty((3, n), dtype=compute),
        hidden.new_empty((n if need_direction else 0, h), dtype=compute),
        hidden.new_empty((retained, v), dtype=operand),
        hidden.new_empty((n if entropy else 0,), dtype=compute),
        hidden.new_empty((n if log_sum_sq_probs else 0,), dtype=compute),
        hidden.new_empty((n if mean_logits else 0,), dtype=compute),
        hidden.new_empty((n if top_gap else 0,), dtype=compute),
    )


@torch.library.register_fake("fastdpo::token_logps_backward")  # type: ignore[untyped-decorator]
def _backward_shapes(
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    row_state: Tensor,
    direction: Tensor,
    retained: Tensor,
    weight_sum: Tensor | None = None,
    bias_sum: Tensor | None = None,
    *,
    ignore_index: int,
    num_scored: int,
    logit_scale: float,
    softcap: float,
    temperature: float,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, ...]:
    n, h = hidden.shape
    v = weight.shape[0]
    return (
        hidden.new_empty((n if need_hidden else 0, h)),
        hidden.new_empty((v if need_weight and weight_sum is None else 0, h)),
        (hidden if bias is None else bias).new_empty((v if need_bias and bias_sum is None else 0,)),
    )
