"""The manifest of a checkpoint: what lies in it, told by digests, so that a resume knows whether it is still there.

It is written after everything else, so that a checkpoint without one was not written to its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastdpo.ref_cache.durable import UNFINISHED
from fastdpo.trainer.digests import HEADER, file_digests, flush_to_disk
from fastdpo.trainer.json_files import read_sealed, write_sealed

MANIFEST_FILE = "fastdpo_manifest.json"
_FORMAT = 1
_NAMED = 4  # tensors of one file that a message names


@dataclass(frozen=True)
class Manifest:
    """What a folder that was saved holds.

    Attributes:
        files: path in the folder -> its size in "bytes", and the "digests" of its parts.
        weights: name -> digest of each tensor of the live model, see :class:`fastdpo.trainer.digests.WeightDigests`.
        settings: those of the run that a resume has to know.
        rows: how many rows it trained on, and the fingerprints of their tokens, weights and margins (None for none);
            empty for a stream.
        evaluation_owed: one was due at its step, and left out because the run was told to stop.
        versions: of what wrote it.
    """

    files: dict[str, dict[str, Any]]
    weights: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Any] = field(default_factory=dict)
    evaluation_owed: bool = False
    versions: dict[str, str] = field(default_factory=dict)

    def damage(self, folder: Path) -> list[str]:
        """What of ``folder`` is not as it was written, a line a file, by its name; empty where all is."""
        return [line for name in self.files if (line := self._damage_of(folder, name))]

    def is_complete(self, folder: Path) -> bool:
        """Whether all files are there in their sizes, which is soon seen."""
        return not any(_wrong_size(folder / name, entry["bytes"]) for name, entry in self.files.items())

    def _damage_of(self, folder: Path, name: str) -> str:
        entry, path = self.files[name], folder / name
        size = _wrong_size(path, entry["bytes"])
        if size and (path.suffix != ".safetensors" or not path.exists()):
            return f"{name} {size}"
        try:
            found = file_digests(path)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"
        if found == entry["digests"]:
            return f"{name} {size}" if size else ""
        tensors = _differences(entry["digests"], found)
        return f"{name} {size or 'is not what was written'}{f': {tensors}' if tensors else ''}"


def write_manifest(folder: Path, names: list[str] | None = None, **facts: Any) -> Manifest:
    """Take note of the files of ``folder`` as they are, once they would survive a power cut.

    Args:
        folder: a checkpoint, or what a run leaves.
        names: of the files; by default all that lie in the folder and its folders.
        facts: the other fields of a :class:`Manifest`.
    """
    paths = [folder / name for name in names] if names is not None else sorted(folder.rglob("*"))
    files = {}
    for path in paths:
        if path.is_file() and path.name != MANIFEST_FILE and not path.name.startswith(UNFINISHED):
            flush_to_disk(path)
            entry = {"bytes": path.stat().st_size, "digests": file_digests(path)}
            files[path.relative_to(folder).as_posix()] = entry
    # Names survive with the folders that they stand in; the manifest's own is seen to where it is written.
    for inner in {(folder / name).parent for name in files} - {folder} | {folder.parent}:
        flush_to_disk(inner)
    manifest = Manifest(files, versions=_versions(), **facts)
    write_sealed(folder / MANIFEST_FILE, {"format": _FORMAT, **asdict(manifest)})
    return manifest


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder; None where there is none, or it is not what was written, or of a later format."""
    values = read_sealed(folder / MANIFEST_FILE)
    if values is None or values.pop("format", None) != _FORMAT:
        return None
    try:
        manifest = Manifest(**values)
        sound = all(
            isinstance(entry["bytes"], int) and isinstance(entry["digests"], dict) for entry in manifest.files.values()
        )
    except (TypeError, KeyError, AttributeError):
        return None
    others = (manifest.weights, manifest.settings, manifest.rows, manifest.versions)
    return manifest if sound and all(isinstance(value, dict) for value in others) else None


def damage_in(folder: Path) -> list[str]:
    """As :meth:`Manifest.damage`, of the manifest in the folder; a folder without one has a line that says so.

    What was read once in this process is not read again unless it changed.
    """
    stats = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    return list(_damage_in(folder, tuple((str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats)))


@lru_cache(maxsize=64)
def _damage_in(folder: Path, _state: tuple[tuple[str, int, int], ...]) -> tuple[str, ...]:
    manifest = read_manifest(folder)
    if manifest is None:
        broken = (folder / MANIFEST_FILE).exists()
        return (f"{MANIFEST_FILE} {'cannot be read' if broken else 'is missing'}",)
    return tuple(manifest.damage(folder))


def _wrong_size(path: Path, expected: int) -> str:
    try:
        size = path.stat().st_size
    except OSError:
        return "is missing"
    if size == expected:
        return ""
    return "is empty" if size == 0 else f"has {size:,} bytes of {expected:,}"


def _differences(expected: Mapping[str, str], found: Mapping[str, str]) -> str:
    """Of a safetensors file: which tensors are not what they were; empty where that cannot be told."""
    if HEADER not in expected:
        return ""
    if HEADER not in found:
        return ""
    kinds = {
        "missing": expected.keys() - found.keys(),
        "not known": found.keys() - expected.keys(),
        "altered": {name for name in expected.keys() & found.keys() - {HEADER} if expected[name] != found[name]},
    }
    return "; ".join(f"{kind}: {name_some(names)}" for kind, names in kinds.items() if names) or "its header"


def name_some(names: set[str] | list[str]) -> str:
    """Some of the names, in their order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - _NAMED:,} more" if len(ordered) > _NAMED else ""
    return ", ".join(ordered[:_NAMED]) + more


def _versions() -> dict[str, str]:
    found = {}
    for name in ("fastdpo", "transformers", "torch", "peft", "accelerate"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
