"""JSON files that a run reads back: what is not what was written is nothing, whatever is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import xxhash

from fastdpo.ref_cache.durable import write_json

_SEAL = "digest"  # of all the rest


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a file; None where there is no file, or none that can be read, or something else in it."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def write_sealed(path: Path, values: dict[str, Any]) -> None:
    """``values``, and their digest: a bit that flips may leave JSON, and another number in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, values | {_SEAL: _digest(values)})


def read_sealed(path: Path) -> dict[str, Any] | None:
    """What :func:`write_sealed` wrote; None where it is not there, or not what was written."""
    values = read_object(path)
    if values is None:
        return None
    seal = values.pop(_SEAL, None)
    return values if seal == _digest(values) else None


def _digest(values: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(values, sort_keys=True).encode()).hexdigest()
