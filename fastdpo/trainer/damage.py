"""What a checkpoint lacks, or has in pieces, as far as it can be told without what its manifest says."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from types import NoneType
from typing import Any

from safetensors import SafetensorError, safe_open

from fastdpo.trainer.json_files import read_object

STATE_FILE = "trainer_state.json"

# What a run cannot go on without, and the names that Trainer, accelerate and DeepSpeed give it.
_NEEDED = {
    "model.safetensors": (
        "model*.safetensors",
        "pytorch_model*",
        "adapter_model.*",
        "*/adapter_model.*",
        "global_step*",
    ),
    "optimizer.pt": ("optimizer.*", "optimizer_*", "rank*-optimizer.pt", "global_step*"),
    "scheduler.pt": ("scheduler.pt", "global_step*"),
    "rng_state.pth": ("rng_state*.pth",),
}


def missing_state(checkpoint: Path) -> list[str]:
    """What of a training's state is not there, a line each: weights, optimiser, schedule, random numbers, step."""
    lines = [f"{name} is missing" for name, patterns in _NEEDED.items() if not _has_any(checkpoint, patterns)]
    if "optimizer.pt is missing" in lines and "scheduler.pt is missing" in lines:
        lines.append("with --save_only_model a checkpoint can be started from (--model_name_or_path), not resumed")
    state = read_object(checkpoint / STATE_FILE) or {}
    if not (checkpoint / STATE_FILE).is_file():
        lines.append(f"{STATE_FILE} is missing")
    elif not _is_state(state):
        lines.append(f"{STATE_FILE} is not what Trainer writes")
    return lines


def _is_state(state: dict[str, Any]) -> bool:
    kinds: dict[str, Any] = {"global_step": int, "max_steps": int, "epoch": (int, float, NoneType), "log_history": list}
    return all(isinstance(state.get(name, ...), kind) for name, kind in kinds.items()) and all(
        isinstance(entry, dict) for entry in state["log_history"]
    )


def damage_without_manifest(checkpoint: Path) -> list[str]:
    """The files of a checkpoint that cannot be read to their end, a line each."""
    return [
        f"{path.relative_to(checkpoint)} cannot be read to its end"
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and not _is_readable(path)
    ]


def _has_any(folder: Path, patterns: tuple[str, ...]) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))


def _is_readable(path: Path) -> bool:
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="numpy"):  # which compares the header with the file's size
                return True
        if path.suffix in (".pt", ".pth", ".bin"):
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, SafetensorError, zipfile.BadZipFile):
        return False
    return True
