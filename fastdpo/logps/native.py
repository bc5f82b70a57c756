"""Loads the compiled ops, checks that they fit the running torch, and gives them shape functions (fake tensors).

Where no library can be loaded the ops are declared all the same; who computes them then stands in device_paths.py.
"""

from __future__ import annotations

import ctypes
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdpo.logps import builds

_FOLDER = Path(__file__).parents[1]  # the package, beside whose files the libraries are
CUDA_LIBRARY = _FOLDER / "fastdpo_cuda.so"
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


def _cuda_misfit() -> str | None:
    """Why the CUDA library cannot be used here; None if it can."""
    if torch.version.hip is not None:
        return f"this torch is built for ROCm {torch.version.hip}, and fastdpo has kernels for NVIDIA's GPUs alone"
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if not CUDA_LIBRARY.is_file():
        return f"fastdpo was built without nvcc: rebuild it where nvcc is, `{builds.REBUILD}`"
    return None


def _load() -> dict[str, Any]:
    """Loads what fits and is wanted; returns its facts, and why a library is not in ``cpu_reason``, ``cuda_reason``."""
    build = builds.read(_FOLDER)
    cpu_reason = _asked("FASTDPO_CPU_PATH", (*_CPU_PATHS, PORTABLE))
    cuda_reason = _asked("FASTDPO_CUDA_PATH", (PORTABLE,))

    facts: dict[str, Any] = dict.fromkeys(("version", "compiler", "torch_built_against", "cpu_library"))
    facts |= {"torch_running": torch.__version__, "cpu_path": PORTABLE, "cpu_libraries": list(build.cpu)}
    facts |= {"cuda_library": "not built", **build.cuda}
    if cpu_reason is None:
        told, cpu_reason = _load_cpu(build)
        facts |= told
        if cpu_reason is not None:
            _warn_of_portable("CPU", cpu_reason)
    if cuda_reason is None:
        told, cuda_reason = _load_cuda(declare=cpu_reason is not None)
        facts |= told
        if cuda_reason is not None and torch.version.cuda is not None:
            _warn_of_portable("CUDA", cuda_reason)
    if cuda_reason is not None and CUDA_LIBRARY.is_file():
        facts["cuda_library"] = f"built, not loaded: {cuda_reason}"
    if cpu_reason is not None and cuda_reason is not None:
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


def _load_cpu(build: builds.Build) -> tuple[dict[str, Any], str | None]:
    """What the CPU library for this torch says of itself; and why there is none in use, or None."""
    library = build.cpu_library(torch.__version__)
    if library is None:
        return {}, build.cpu_misfit(torch.__version__)
    if (refused := _refused(library)) is not None:
        return {}, refused
    built = _told(library, "fastdpo_cpu_build_facts")
    if "error" in built:
        raise RuntimeError(built["error"])
    facts = {name: built[name] for name in ("version", "compiler", "cpu_path")}
    return facts | {"torch_built_against": built["torch"], "cpu_library": library.name}, None


def cpu_products() -> dict[str, str]:
    """By dtype, how the CPU library makes its matrix products; it has to be loaded."""
    return _told(_FOLDER / FACTS["cpu_library"], "fastdpo_cpu_products")


def cpu_library() -> ctypes.CDLL | None:
    """The CPU library, where it is in use."""
    name = FACTS["cpu_library"]
    return None if name is None else ctypes.CDLL(str(_FOLDER / name))


def _told(library: Path, function: str) -> dict[str, Any]:
    """The JSON that one of a library's functions returns."""
    tell = getattr(ctypes.CDLL(str(library)), function)
    tell.restype = ctypes.c_char_p
    told: dict[str, Any] = json.loads(tell())
    return told


def _refused(library: Path) -> str | None:
    """Loads a library; returns why it cannot be (a torch that was compiled otherwise than its release may lack what is
    needed), or None."""
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library.name} cannot be loaded with torch {torch.__version__}: {error.__cause__ or error}"
    return None


def _load_cuda(*, declare: bool) -> tuple[dict[str, Any], str | None]:
    """What the CUDA library says of itself, and why it is not in use, or None; with ``declare``, has it declare the ops
    that the CPU library would."""
    if (reason := _cuda_misfit() or _refused(CUDA_LIBRARY)) is not None:
        return {}, reason
    if declare and ctypes.CDLL(str(CUDA_LIBRARY)).fastdpo_declare_ops():
        raise ImportError(
            f"torch {torch.__version__} refused the ops of {CUDA_LIBRARY.name}: rebuild it with `{builds.REBUILD}`"
        )
    built = _told(CUDA_LIBRARY, "fastdpo_cuda_build_facts")
    facts = {"cuda_archs": built["archs"].split(), "nvcc": built["nvcc"], "cuda_level1": built["level1"]}
    return facts | {"cuda_library": "loaded"}, None


def driver_misfit(nvcc: str, driver: int) -> str | None:
    """Why a library of this nvcc's does not run on a driver for CUDA ``driver`` (12080 is 12.8; 0: there is none)."""
    if driver == 0 or driver // 1000 >= int(nvcc.split(".")[0]):
        return None
    known = f"{driver // 1000}.{driver % 1000 // 10}"
    return (
        f"fastdpo was built with CUDA {nvcc}, and this machine's driver knows {known}: update the driver, or rebuild "
        f"fastdpo with a toolkit that it knows (CUDA_HOME=…; {builds.REBUILD})"
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
