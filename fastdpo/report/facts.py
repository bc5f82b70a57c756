"""What a run was: its settings, its surroundings and its command, for those who read about it or repeat it."""

from __future__ import annotations

import dataclasses
import os
import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from fastdpo.logps.device_paths import build_info

_PACKAGES = ("fastdpo", "torch", "transformers", "datasets", "accelerate", "peft", "tokenizers")
_HIDDEN = "(hidden)"


def all_settings(arguments: Sequence[Any]) -> dict[str, Any]:
    """name -> value of all fields of some dataclasses of flags; access tokens are hidden."""
    values = {f.name: getattr(part, f.name) for part in arguments for f in dataclasses.fields(part)}
    return {name: _HIDDEN if value and _is_secret(name) else value for name, value in values.items()}


def changed_settings(asked: dict[str, tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    """name -> (value, default), of those that differ; access tokens are hidden."""
    return {
        name: (_HIDDEN if _is_secret(name) else value, default)
        for name, (value, default) in asked.items()
        if value != default
    }


def command_line(argv: Sequence[str], command: str = "train") -> str:
    """What to type for the same run again, with access tokens hidden."""
    words, hide = [], False
    for word in argv:
        name, equals, _ = word.partition("=")
        if hide:
            words.append(_HIDDEN)
        elif word.startswith("--") and equals and _is_secret(name):
            words.append(f"{name}={_HIDDEN}")
        else:
            words.append(word)
        hide = not hide and word.startswith("--") and not equals and _is_secret(name)
    return shlex.join(["fastdpo", command, *words])


def _is_secret(name: str) -> bool:
    return name.replace("-", "_").endswith("_token") and not name.replace("-", "_").endswith("pad_token")


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
