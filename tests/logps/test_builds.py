"""Which of the libraries that were built is taken by which torch. Their files are empty: nothing is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastdpo.logps import builds

WHEEL = {"2.11.0": "fastdpo_cpu_torch2.11.so", "2.13.0": "fastdpo_cpu_torch2.13.so"}


def built(folder: Path, cpu: dict[str, str], *, wheel: bool = True, files: bool = True) -> builds.Build:
    (folder / "_build.json").write_text(json.dumps({"cpu": cpu, "wheel": wheel, "nvcc": "13.0"}))
    for name in cpu.values() if files else ():
        (folder / name).touch()
    return builds.read(folder)


@pytest.mark.parametrize(
    ("of", "running", "served"),
    [
        ("2.13.0", "2.13.0", True),
        ("2.13.0", "2.13.0+cpu", True),
        ("2.13.0+cpu", "2.13.1+cu130", True),  # a patch release, and another build
        ("2.13.0", "2.1.0", False),
        ("2.1.0", "2.13.0", False),
        ("2.13.0", "2.12.1", False),
        ("2.13.0", "3.13.0", False),
        ("2.13.0", "2.13.0a0+gitabcdef0", False),  # headers of a day of their own
        ("2.13.0", "2.13.0.dev20260601+cpu", False),
        ("2.13.0", "2.13.0rc2", False),
        ("2.13.0a0+gitabcdef0", "2.13.0a0+gitabcdef0", True),
        ("2.13.0a0+gitabcdef0", "2.13.0a0+git1234567", False),
        ("2.13.0a0+gitabcdef0", "2.13.0", False),
    ],
)
def test_what_a_library_serves(of: str, running: str, served: bool) -> None:
    assert builds.serves(of, running) is served


@pytest.mark.parametrize("running", ["2.11.0", "2.11.0+cu126", "2.13.0+cpu", "2.13.7"])
def test_a_torch_takes_the_library_of_its_release(tmp_path: Path, running: str) -> None:
    taken = built(tmp_path, WHEEL).cpu_library(running)
    assert taken == tmp_path / f"fastdpo_cpu_torch{running[:4]}.so"


@pytest.mark.parametrize("running", ["2.10.0", "2.12.0", "2.15.0+cpu", "2.13.0a0+git1"])
def test_a_wheel_says_what_it_is_for(tmp_path: Path, running: str) -> None:
    build = built(tmp_path, WHEEL)
    assert build.cpu_library(running) is None
    assert build.cpu_misfit(running) == (
        f"this wheel of fastdpo has libraries for torch 2.11 or 2.13, and this is torch {running}: install one of "
        "those, or fastdpo from its source, which builds it for this torch."
    )


def test_a_build_of_ones_own_says_how_to_build_again(tmp_path: Path) -> None:
    said = built(tmp_path, {"2.13.0+cpu": "a.so"}, wheel=False).cpu_misfit("2.14.0")
    assert said.startswith("fastdpo was built for torch 2.13.0+cpu, but this is torch 2.14.0: rebuild it with `pip ")


def test_a_library_whose_file_is_gone_is_none(tmp_path: Path) -> None:
    build = built(tmp_path, WHEEL, files=False)
    assert build.cpu_library("2.13.0") is None and "extension is missing: build it" in build.cpu_misfit("2.13.0")
    (tmp_path / WHEEL["2.11.0"]).touch()
    assert list(builds.read(tmp_path).cpu) == ["2.11.0"]


def test_where_nothing_was_built(tmp_path: Path) -> None:
    build = builds.read(tmp_path)
    assert build.cpu_library("2.13.0") is None and "is missing" in build.cpu_misfit("2.13.0")
    assert build.cuda == {"cuda_archs": None, "nvcc": None, "cuda_level1": None}
