"""What a check's outcome on a CUDA device depends on, and what is known of the device without one."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from fastdpo.logps.native import FACTS, driver_misfit


class CudaDevices:
    """NVIDIA's GPUs, as torch sees them. (See DeviceKind in self_check.py.)"""

    name = "CUDA"

    def __init__(self, library: Path) -> None:
        self._library = library

    def facts(self, device: torch.device) -> dict[str, str]:
        properties = torch.cuda.get_device_properties(device)
        return {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "driver": driver(),
            "torch": torch.__version__,
            "cuda": str(torch.version.cuda),
            "build": _digest(self._library),
        }

    def misfit(self, device: torch.device) -> str | None:
        if (reason := driver_misfit(FACTS["nvcc"], _driver_api())) is not None:
            return reason
        return arch_misfit(torch.cuda.get_device_capability(device), FACTS["cuda_archs"])

    def is_capturing(self, device: torch.device) -> bool:
        with torch.cuda.device(device):
            return torch.cuda.is_current_stream_capturing()

    def works(self, device: torch.device) -> bool:
        try:
            return torch.ones(1, device=device).item() == 1
        except RuntimeError:
            return False


def arch_misfit(capability: tuple[int, int], archs: Sequence[str]) -> str | None:
    """Why a device of this compute capability has no kernel among those compiled for ``archs``; None if it has one.

    Compiled code runs on its own capability and on later ones of the same major number; that of an ``a`` on its own.
    """
    major, minor = capability
    for arch in archs:
        of_major, of_minor = map(int, arch.rstrip("a").split("."))
        if of_major == major and (of_minor == minor or (of_minor < minor and not arch.endswith("a"))):
            return None
    return (
        f"its compute capability is {major}.{minor}, and they were compiled for {', '.join(archs)}; rebuild fastdpo "
        "with TORCH_CUDA_ARCH_LIST naming it, if it is 8.0 or above"
    )


@functools.cache
def driver() -> str:
    """The driver's version, as far as it can be known without a library of NVIDIA's."""
    words = ""
    with suppress(OSError):
        words = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    return f"{words or 'unknown'} (CUDA {_driver_api()})"


def _driver_api() -> int:
    """The CUDA version that the driver knows, 12080 for 12.8; 0 where there is no driver."""
    version: int = getattr(torch._C, "_cuda_getDriverVersion", int)()
    return version


@functools.cache
def _digest(library: Path) -> str:
    return hashlib.sha256(library.read_bytes()).hexdigest()[:16]
