"""What a run was: its settings, its surroundings and its command, for those who read about it or repeat it."""

from __future__ import annotations

import os
import platform
import shlex
from collections.abc import Sequence
from dataclasses import fields
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from fastdpo.logps.device_paths import build_info
from fastdpo.report.launcher import launcher_words
from fastdpo.trainer.secrets import redacted, redacted_words

_PACKAGES = ("fastdpo", "torch", "transformers", "datasets", "accelerate", "peft", "tokenizers")


def all_settings(arguments: Sequence[Any]) -> dict[str, Any]:
    """name -> value of all fields of some dataclasses of flags; secrets are hidden."""
    settings: dict[str, Any] = redacted({f.name: getattr(part, f.name) for part in arguments for f in fields(part)})
    return settings


def changed_settings(asked: dict[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    """name -> (value, default), of those that differ; secrets are hidden."""
    values = redacted({name: value for name, (value, _) in asked.items()})
    return {name: (values[name], default) for name, (value, default) in asked.items() if value != default}


def command_line(argv: Sequence[str], command: str = "train") -> str:
    """What to type for the same run again, with what its processes were started by; secrets are hidden."""
    return shlex.join([*launcher_words(), command, *redacted_words(argv)])


def environment(device: torch.device, processes: int = 1) -> dict[str, str]:
    """Versions, the machine, and which of our kernels ran."""
    facts = {"device": device_name(device), "processes": str(processes)}
    facts |= {"CPU": f"{_cpu_name()}, {os.cpu_count()} logical cores", "threads": str(torch.get_num_threads())}
    facts |= {"system": platform.platform(), "Python": platform.python_version()}
    for name in _PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    for name, value in build_info().items():
        words = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        facts[f"build: {name}"] = words
    return facts


def device_name(device: torch.device) -> str:
    """What a person calls the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type.upper()} ({_cpu_name()})"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
