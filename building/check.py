"""Installs the wheel where there is no compiler, and uses it: `make wheel-check`.

    python -m building.check python3.12:2.14.1 python3.11:2.13.0+cpu

makes for each of these an environment with that torch, installs the wheel of dist/ and times it, and then, with
nothing but the environment's own programs on PATH: asks `fastdpo info` which library was taken, runs
`fastdpo demo --quick`, and the losses' and the primitive's tests against their oracles. An environment is deleted once
it has passed, and kept otherwise, or with --keep.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from building.ninja import ROOT

# What the tests need; the wheel brings the rest.
TEST_PACKAGES = ("pytest>=8", "hypothesis>=6.100", "mpmath>=1.3")
TESTS = ("loss/test_fused.py", "loss/test_pair_losses.py", "logps/test_primitive.py")
COMPILERS = ("cc", "gcc", "g++", "c++", "clang", "clang++", "nvcc", "ninja", "ld")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m building.check", description=__doc__)
    parser.add_argument("checks", nargs="+", metavar="PYTHON:TORCH", help="such as python3.12:2.14.1")
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="the folder that the wheel is in")
    parser.add_argument(
        "--environments", type=Path, help="the folder to make them in, gigabytes each; those there are used"
    )
    parser.add_argument("--keep", action="store_true", help="leave the environments there")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files below tests/, and what else pytest takes")
    args = parser.parse_args()
    wheels = list(args.dist.glob("fastdpo-*.whl"))
    if len(wheels) != 1:
        sys.exit(f"{args.dist} should hold one wheel of fastdpo, of `make wheel`, and holds {len(wheels)}")
    environments = args.environments or Path(tempfile.mkdtemp(prefix="fastdpo-wheel-"))
    for check in args.checks:
        python, torch = check.split(":")
        folder = environments / f"{Path(python).name}-torch{torch}"
        folder.mkdir(parents=True, exist_ok=True)
        print(f"== {check}, in {folder}", flush=True)
        _check(folder, python, torch, wheels[0].resolve(), args.tests)
        if not args.keep:
            shutil.rmtree(folder)


def _check(folder: Path, python: str, torch: str, wheel: Path, tests: Sequence[str]) -> None:
    own = folder / "venv"
    if not own.exists():
        subprocess.run([python, "-m", "venv", own], check=True)
    seconds = {"torch": _pip(own, f"torch=={torch}")}
    # For themselves: what is timed then is the wheel alone.
    seconds["other packages"] = _pip(own, *_requirements(wheel), *TEST_PACKAGES)
    seconds["the wheel"] = _pip(own, "--force-reinstall", "--no-deps", str(wheel))
    said = ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    print(f"installed: {said}; the wheel is {wheel.stat().st_size / 1e6:.1f} MB", flush=True)

    bare = {
        name: value for name, value in os.environ.items() if not re.match("PYTHON|CUDA|CXX|CC$|FASTDPO|TORCH", name)
    }
    bare |= {"PATH": str(own / "bin"), "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    if found := [name for name in COMPILERS if shutil.which(name, path=bare["PATH"])]:
        sys.exit(f"not bare: {', '.join(found)}")

    def run(*command: str) -> str:
        begin = time.monotonic()
        done = subprocess.run(command, cwd=folder, env=bare, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
        print(f"{Path(command[0]).name} {' '.join(command[1:4])}: {time.monotonic() - begin:.0f} s", flush=True)
        return done.stdout

    info = run(str(own / "bin/fastdpo"), "info")
    print("\n".join(line for line in info.splitlines() if re.match("torch|cpu_lib|cpu_path|cuda_lib|paths", line)))
    minor = ".".join(torch.split(".")[:2])
    taken = re.search(r"^paths: cpu +(.+)$", info, re.M).group(1)
    expected = f"fastdpo_cpu_torch{minor}.so"
    if f"fastdpo/{expected}" in zipfile.ZipFile(wheel).namelist():
        if not taken.endswith(f"of {expected}"):
            sys.exit(f"the wheel has {expected}, and it was not taken: {taken}")
    elif "portable: this wheel of fastdpo has libraries for torch" not in taken:
        sys.exit(f"the wheel has no {expected}, and that was not said: {taken}")

    run(str(own / "bin/fastdpo"), "demo", "--quick")
    copied = folder / "tests"
    shutil.copytree(ROOT / "tests", copied, ignore=shutil.ignore_patterns("__pycache__"))
    settings = ["-q", "--import-mode=importlib", "-p", "no:cacheprovider", "-c", str(copied / "pytest.ini")]
    markers = "\n    ".join(("", "slow", "campaign", "families", "smollm"))
    (copied / "pytest.ini").write_text(f"[pytest]\npythonpath = support\nmarkers ={markers}\n")
    paths = [str(copied / test) if test.endswith(".py") else test for test in tests]
    print(run(str(own / "bin/python"), "-m", "pytest", *settings, *paths)[-600:])


def _pip(own: Path, *packages: str) -> float:
    begin = time.monotonic()
    subprocess.run([own / "bin/python", "-m", "pip", "install", "--quiet", *packages], check=True)
    return time.monotonic() - begin


def _requirements(wheel: Path) -> list[str]:
    """What the wheel needs, without its extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        needed = re.findall(r"^Requires-Dist: (.+)$", archive.read(name).decode(), re.M)
    return [requirement for requirement in needed if "extra ==" not in requirement]


if __name__ == "__main__":
    main()
