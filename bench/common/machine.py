"""Where and with what a run was made."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastdpo

_PACKAGES = ("torch", "triton", "transformers", "fastdpo", "trl", "liger-kernel", "cut-cross-entropy", "quack-kernels")


def facts_of_run(command: list[str], device: str) -> dict[str, Any]:
    """What every file of results begins with."""
    return {
        "command": command,
        "commit": commit(),
        "machine": machine(device),
        "versions": versions(),
        "build_info": fastdpo.build_info(),
    }


def machine(device: str) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "device": device,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "system": platform.platform(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "gpu_memory": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cuda_level": os.environ.get("FASTDPO_CUDA_LEVEL") or "0",
        }
    return facts


def describe(facts: dict[str, Any]) -> str:
    if facts["device"] == "cuda":
        return f"{facts['gpu']}, CUDA {facts['cuda']}"
    return f"{facts['cpu']}, {facts['threads']} of {facts['cores']} cores"


def packages(versions: dict[str, str | None]) -> str:
    """Those of a training, with their versions, for the head of a table."""
    return ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "trl", "fastdpo"))


def warn_of_load(facts: dict[str, Any]) -> str | None:
    """What to say where others use the machine, or None."""
    if facts["device"] == "cuda" or facts["load"] < 0.5 * facts["cores"]:
        return None
    return f"load average {facts['load']:.1f}: others use these cores, and the figures suffer from it"


def versions() -> dict[str, str | None]:
    return {"python": platform.python_version()} | {package: _version(package) for package in _PACKAGES}


def commit() -> str | None:
    """The checkout's commit, with a + where files differ from it, those that benchmarks write apart.

    Where it is no checkout: what the environment variable FASTDPO_COMMIT says, or None.
    """
    git = ["git", "-C", str(Path(__file__).parents[2])]
    changes = ["status", "--porcelain", "--untracked-files=no", "--", ".", ":(exclude)bench/results"]
    try:
        head, changed = (
            subprocess.run([*git, *arguments], capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], changes)
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FASTDPO_COMMIT")
    return head + ("+" if changed else "")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
