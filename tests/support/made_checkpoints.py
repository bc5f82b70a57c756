"""Folders that look like a trainer's checkpoints, without a training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fastdpo.trainer.manifest import write_manifest


def make_checkpoint(folder: Path, step: int, *, manifest: bool = True, **facts: Any) -> Path:
    """``folder/checkpoint-<step>``, with every file that a resume needs; without a manifest, not written to its end."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"a": torch.full((3, 4), float(step)), "b": torch.arange(5.0)}, path / "model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"step": torch.tensor(step)}, path / name)
    state = {"global_step": step, "max_steps": 100, "epoch": 1.0, "log_history": [{"loss": 0.5, "step": step}]}
    (path / "trainer_state.json").write_text(json.dumps(state))
    if manifest:
        write_manifest(path, **facts)
    return path
