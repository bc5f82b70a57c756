"""Files that a kill leaves whole or absent, and tensors in them that are known to be damaged when they are.

Every file is written beside its place, flushed to the disk, and then renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

# What the name of a file begins with while it is written; a kill may leave it.
UNFINISHED = ".unfinished-"


def write_json(path: Path, value: Any) -> None:
    """``value`` as JSON that people can read. Halves of a pair, as in names that are no text, become its escapes."""
    _write(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace"))


def write_tensors(path: Path, tensors: dict[str, np.ndarray], key: str = "") -> None:
    """A safetensors file with a checksum, and the key that it belongs to."""
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    _write(path, save(tensors, {"key": key, "sha256": _checksum(tensors)}))


def read_tensors(path: Path, key: str | None = None) -> dict[str, np.ndarray] | None:
    """The tensors of a file; None where it is absent, torn, altered, or belongs to another key."""
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata() or {}
    except (OSError, SafetensorError):
        return None
    sound = metadata.get("sha256") == _checksum(tensors) and (key is None or metadata.get("key") == key)
    return tensors if sound else None


def _checksum(tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    """All of it, or nothing: a reader never sees a file that is half there, whatever kills the writer."""
    unfinished = path.with_name(f"{UNFINISHED}{uuid.uuid4().hex[:8]}-{path.name}")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.rename(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
