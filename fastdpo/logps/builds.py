"""What was built beside the package, and whether one of the CPU libraries is for the running torch.

A CPU library calls functions of ATen, and is compiled for one minor release of torch: its patch releases, and its
builds for the CPU and for each CUDA, have the same headers. What is no final release (2.14.0a0+git…, a nightly) may
have others, and takes a library of that very build alone. A torch without a library of its own takes none.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

REBUILD = "pip install --no-build-isolation -e ."
_FINAL = re.compile(r"(\d+)\.(\d+)\.\d+(\+.*)?")


class Build(NamedTuple):
    """What the build wrote into ``_build.json``."""

    folder: Path  # the package's
    cpu: Mapping[str, str]  # torch's version -> the CPU library for it, those whose files are there
    is_wheel: bool  # made for several torches, for other machines
    cuda: Mapping[str, Any]  # facts of the CUDA library

    def cpu_library(self, torch: str) -> Path | None:
        """The library for a version of torch."""
        found = [name for version, name in self.cpu.items() if serves(version, torch)]
        return self.folder / found[0] if found else None

    def cpu_misfit(self, torch: str) -> str:
        """Why there is none, and what to do."""
        if not self.cpu:
            return f"fastdpo's compiled extension is missing: build it with `{REBUILD}` in fastdpo's source folder."
        if self.is_wheel:
            return (
                f"this wheel of fastdpo has libraries for torch {_listed(map(minor, self.cpu))}, and this is torch "
                f"{torch}: install one of those, or fastdpo from its source, which builds it for this torch."
            )
        return (
            f"fastdpo was built for torch {_listed(self.cpu)}, but this is torch {torch}: rebuild it with `{REBUILD}` "
            "in fastdpo's source folder."
        )


def read(folder: Path) -> Build:
    """What was built in the package's folder; nothing, where nothing was."""
    file = folder / "_build.json"
    facts = json.loads(file.read_text()) if file.is_file() else {}
    cpu = {version: name for version, name in facts.get("cpu", {}).items() if (folder / name).is_file()}
    cuda = {name: facts.get(name) for name in ("cuda_archs", "nvcc", "cuda_level1")}
    return Build(folder, cpu, facts.get("wheel", False), cuda)


def serves(built: str, running: str) -> bool:
    """Whether what was built for one version of torch may be used with another."""
    final = _FINAL.fullmatch(built), _FINAL.fullmatch(running)
    return built == running or (None not in final and minor(built) == minor(running))


def minor(version: str) -> str:
    """Such as 2.13."""
    return ".".join(version.split(".")[:2])


def _listed(names: Any) -> str:
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last
