"""Builds the native libraries (building/) into the package.

TORCH_CUDA_ARCH_LIST cuts the list of GPU architectures (what it names beside them, and what the toolkit is too old for,
is left out), MAX_JOBS the number of compilers at once.

`make wheel` calls this with the releases of torch to have CPU libraries for; alone, it builds one, for the torch that
is installed. The wheel serves every Python, since nothing that is compiled has any of it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # an isolated build does not have it there

from building import torch_tree  # noqa: E402
from building.libraries import NativeBuild  # noqa: E402
from building.toolkit import cuda_archs, find_toolkit, level1_fact  # noqa: E402
from building.torch_tree import RELEASES_WANTED  # noqa: E402


class BuildNative(build_ext):
    """setuptools' build_ext, with ninja for a compiler."""

    def run(self) -> None:
        releases = os.environ.get(RELEASES_WANTED)
        build = NativeBuild(ROOT / "build/native", portable=releases is not None)
        torch = torch_tree.running()
        trees = {torch.version: torch}
        if releases is not None:
            trees = {release: torch_tree.of_release(release, ROOT / "build") for release in releases.split(",")}
        cpu = {release: build.cpu_library(tree) for release, tree in trees.items()}
        libraries = list(cpu.values())
        toolkit = find_toolkit()
        if toolkit is not None:
            libraries.append(build.cuda_library(toolkit, torch))
        build.run(toolkit)
        in_place = self.inplace or self.editable_mode
        destination = ROOT / "fastdpo" if in_place else Path(self.build_lib) / "fastdpo"
        destination.mkdir(parents=True, exist_ok=True)
        for old in destination.glob("fastdpo_cpu_*.so"):
            old.unlink()
        for library in libraries:
            # A new file, not new content: a process that has the old one mapped keeps it.
            (destination / library.name).unlink(missing_ok=True)
            shutil.copy2(library, destination / library.name)
        facts = {
            "cpu": {version: library.name for version, library in cpu.items()},
            "wheel": releases is not None,
            "cuda_archs": cuda_archs(toolkit) if toolkit else [],
            "nvcc": toolkit.version if toolkit else None,
            "cuda_level1": level1_fact(toolkit),
        }
        (destination / "_build.json").write_text(json.dumps(facts) + "\n")

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class WheelOfAllPythons(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("fastdpo.native", sources=[])],  # there is something to build; what, says BuildNative
        cmdclass={"build_ext": BuildNative, "bdist_wheel": WheelOfAllPythons},
    )
