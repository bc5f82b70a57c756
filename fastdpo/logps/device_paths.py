"""Which path each device takes, and why.

CPU tensors go through our CPU kernels and CUDA tensors through our CUDA kernels, where these were built for the running
torch; every other device, and these two elsewhere, goes through the same ops in plain PyTorch (portable.py). CUDA
kernels are checked on the device before they are trusted with a result (self_check.py).

It is PyTorch's dispatcher that is told, below autograd, autocast and fake tensors: whoever calls the ops, eagerly or in
a compiled graph, takes the device's path.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from fastdpo.logps.check_cases import Ops
from fastdpo.logps.cuda_devices import CudaDevices
from fastdpo.logps.native import CUDA_LIBRARY, FACTS, PORTABLE, cpu_products
from fastdpo.logps.portable import token_logps_forward
from fastdpo.logps.portable_backward import token_logps_backward
from fastdpo.logps.self_check import Gate

PORTABLE_OPS = Ops(token_logps_forward, token_logps_backward)
_DTYPES = ("float32", "bfloat16", "float16", "float64")


def kernels(key: str) -> Ops:
    """The ops as the libraries have them for a dispatch key, CPU or CUDA, past everything that stands before them."""
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.__members__[key])
    names = (f"fastdpo::token_logps_{op}" for op in Ops._fields)
    return Ops(*(partial(torch.library.get_kernel(name, key).call_boxed, keys) for name in names))


def register(library: torch.library.Library, ops: Ops, key: str) -> None:
    """``ops`` for a dispatch key, as long as ``library`` lives; before what was registered for it, if anything was."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        for name, op in ops._asdict().items():
            library.impl(f"token_logps_{name}", op, key)


_registered = torch.library.Library("fastdpo", "FRAGMENT")
# What stands in for kernels wherever a device has none of its own.
register(_registered, PORTABLE_OPS, "CompositeExplicitAutograd")
# What stands before the CUDA kernels; None where these are not loaded.
CUDA_GATE: Gate | None = None
if FACTS["cuda_library"] == "loaded":
    CUDA_GATE = Gate(kernels("CUDA"), PORTABLE_OPS, CudaDevices(CUDA_LIBRARY))
    register(_registered, Ops(CUDA_GATE.forward, CUDA_GATE.backward), "CUDA")

_everywhere = False


def is_portable(device: torch.device) -> bool:
    """Whether the device's tensors go through plain PyTorch for certain: CUDA's may come to that (self_check.py)."""
    if _everywhere:
        return True
    if device.type == "cpu":
        return bool(FACTS["cpu_path"] == PORTABLE)
    return device.type != "cuda" or FACTS["cuda_library"] != "loaded"


@contextmanager
def portable_everywhere() -> Iterator[None]:
    """Plain PyTorch for all tensors of the process: to measure it, or to test it, where there are kernels."""
    global _everywhere
    library, before = torch.library.Library("fastdpo", "IMPL"), _everywhere
    for key in ("CPU", "CUDA"):
        register(library, PORTABLE_OPS, key)
    _everywhere = True
    try:
        yield
    finally:
        _everywhere = before
        del library  # and with it what it registered


def build_info() -> dict[str, Any]:
    """How fastdpo was built and what of it is in use here.

    Returns:
        A dict with ``version``, ``compiler``, ``torch_built_against``, ``torch_running``, ``cpu_libraries`` (the
        releases of torch that there is a CPU library for), ``cpu_library`` (the one in use, or None), ``cpu_path``
        (``avx512_bf16``, ``avx512``, ``avx2`` or ``plain``, chosen for this processor, or ``portable``, plain PyTorch;
        or what the environment variable FASTDPO_CPU_PATH says), ``cpu_products`` (per dtype of the inputs: the fused
        kernels with operands of which type, ``at::mm in chunks``, or ``torch.mm in chunks``), the CUDA library's
        ``cuda_archs`` (compute capabilities compiled), ``nvcc`` (its version) and ``cuda_level1`` (whether it has
        Level 1, a product of our own for Hopper, or why not), ``cuda_library``, whether that is loaded, ``paths`` (by
        type of device, which path its tensors take, and why), and ``self_check`` (what came of the check of the CUDA
        kernels, by the devices, dtypes and levels that this process has used).
    """
    facts = {name: value for name, value in FACTS.items() if not name.endswith("_reason")}
    products = dict.fromkeys(_DTYPES, "torch.mm in chunks")
    if FACTS["cpu_path"] != PORTABLE:
        products = cpu_products()
    outcomes = {} if CUDA_GATE is None else CUDA_GATE.outcomes()
    return facts | {"cpu_products": products, "paths": _paths(), "self_check": outcomes}


def _paths() -> dict[str, str]:
    cpu = f"kernels for {FACTS['cpu_path']}, of {FACTS['cpu_library']}"
    if FACTS["cpu_reason"]:
        cpu = f"portable: {FACTS['cpu_reason']}"
    cuda = f"portable: {FACTS['cuda_reason']}" if FACTS["cuda_reason"] else "kernels, where they pass the self-check"
    return {"cpu": cpu, "cuda": cuda, "mps, xpu, npu, …": "portable: fastdpo has kernels for cpu and cuda alone"}
