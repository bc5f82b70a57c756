"""Loads the compiled ops, checks that they fit the running torch, and gives them shape functions (fake tensors).

Where no library can be loaded the ops are declared all the same; who computes them then stands in device_paths.py.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import platform
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FOLDER = Path(__file__).parents[1]  # the package, beside whose files the libraries are built
CUDA_LIBRARY = _FOLDER / "fastdpo_cuda.so"
_REBUILD = "pip install --no-build-isolation -e ."
# What FASTDPO_CPU_PATH may be, besides PORTABLE: which kernels (csrc/cpu/isa.h).
_CPU_PATHS = ("avx512_bf16", "avx512", "avx2", "plain")
# What that and FASTDPO_CUDA_PATH may be, for plain PyTorch in the place of our kernels.
PORTABLE = "portable"
# kForwardSchema and kBackwardSchema of csrc/fastdpo.h, for where no library declares them.
_SCHEMAS = (
    "token_logps_forward(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, *, int ignore_index, "
    "int num_scored, float logit_scale, float softcap, float temperature, bool need_direction, int retain_bytes, "
    "bool entropy, bool log_sum_sq_probs, bool mean_logits, bool top_gap) -> (Tensor logps, Tensor row_state, "
    "Tensor direction, Tensor retained, Tensor entropy, Tensor log_sum_sq_probs, Tensor mean_logits, Tensor top_gap)",
    "token_logps_backward(Tensor grad_logps, Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, "
    "Tensor row_state, Tensor direction, Tensor retained, Tensor(a!)? weight_sum=None, Tensor(b!)? bias_sum=None, *, "
    "int ignore_index, int num_scored, float logit_scale, float softcap, float temperature, bool need_hidden, "
    "bool need_weight, bool need_bias) -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)",
)
_declared = torch.library.Library("fastdpo", "FRAGMENT")


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


def _cuda_misfit() -> str | None:
    """Why the CUDA library cannot be used here; None if it can."""
    if torch.version.hip is not None:
        return f"this torch is built for ROCm {torch.version.hip}, and fastdpo has kernels for NVIDIA's GPUs alone"
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if not CUDA_LIBRARY.is_file():
        return f"fastdpo was built without nvcc: rebuild it where nvcc is, `{_REBUILD}`"
    return None


def _load() -> dict[str, Any]:
    """Loads what fits and is wanted; returns its facts, and why a library is not in ``cpu_reason``, ``cuda_reason``."""
    build_file = _read_build_file()
    cpu_reason = _asked("FASTDPO_CPU_PATH", (*_CPU_PATHS, PORTABLE))
    cuda_reason = _asked("FASTDPO_CUDA_PATH", (PORTABLE,))
    if cpu_reason is None and (cpu_reason := _cpu_misfit(build_file)) is not None:
        _warn_of_portable("CPU", cpu_reason)
    if cuda_reason is None and (cuda_reason := _cuda_misfit()) is not None and torch.version.cuda is not None:
        _warn_of_portable("CUDA", cuda_reason)

    facts: dict[str, Any] = dict.fromkeys(("version", "compiler", "torch_built_against"))
    facts |= {"torch_running": torch.__version__, "cpu_path": PORTABLE, "cuda_library": "not built"}
    facts |= {name: (build_file or {}).get(name) for name in ("cuda_archs", "nvcc", "cuda_level1")}
    if CUDA_LIBRARY.is_file():
        facts["cuda_library"] = f"built, not loaded: {cuda_reason}"
    if cpu_reason is None:
        built = importlib.import_module("fastdpo._C").build_facts()
        facts |= {
            "version": built["version"],
            "compiler": built["compiler"],
            "torch_built_against": built["torch"],
            "cpu_path": built["cpu_path"],
        }
    if cuda_reason is None:
        facts |= _load_cuda(declare=cpu_reason is not None)
    elif cpu_reason is not None:
        for schema in _SCHEMAS:
            _declared.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    return facts | {"cpu_reason": cpu_reason, "cuda_reason": cuda_reason}


def _asked(variable: str, known: Sequence[str]) -> str | None:
    """The reason for the portable path that an environment variable is."""
    value = os.environ.get(variable, "")
    if value and value not in known:
        raise RuntimeError(f"{variable} is '{value}'; it should be {' or '.join(known)}")
    return f"{variable} is {PORTABLE}" if value == PORTABLE else None


def _warn_of_portable(tensors: str, reason: str) -> None:
    warnings.warn(f"{tensors} tensors go through plain PyTorch, which is right and slower: {reason}", stacklevel=4)


def _load_cuda(*, declare: bool) -> dict[str, Any]:
    """What the CUDA library says of itself; with ``declare``, has it declare the ops that the CPU library would."""
    torch.ops.load_library(str(CUDA_LIBRARY))
    library = ctypes.CDLL(str(CUDA_LIBRARY))
    if declare and library.fastdpo_declare_ops():
        raise ImportError(
            f"torch {torch.__version__} refused the ops of {CUDA_LIBRARY.name}: rebuild it with `{_REBUILD}`"
        )
    library.fastdpo_cuda_build_facts.restype = ctypes.c_char_p
    built = json.loads(library.fastdpo_cuda_build_facts())
    return {
        "cuda_archs": built["archs"].split(),
        "nvcc": built["nvcc"],
        "cuda_level1": built["level1"],
        "cuda_library": "loaded",
    }


def driver_misfit(nvcc: str, driver: int) -> str | None:
    """Why a library of this nvcc's does not run on a driver for CUDA ``driver`` (12080 is 12.8; 0: there is none)."""
    if driver == 0 or driver // 1000 >= int(nvcc.split(".")[0]):
        return None
    known = f"{driver // 1000}.{driver % 1000 // 10}"
    return (
        f"fastdpo was built with CUDA {nvcc}, and this machine's driver knows {known}: update the driver, or rebuild "
        f"fastdpo with a toolkit that it knows (CUDA_HOME=…; {_REBUILD})"
    )


FACTS = _load()


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
