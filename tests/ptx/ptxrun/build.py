"""Compiles the machine, once for the same sources."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
MACHINE = HERE / "machine"
# No contraction: a multiply and an add are fused where PTX says so. -march=native for the host's fused multiply-add,
# without which std::fma is a slow function.
FLAGS = ["-std=c++20", "-O2", "-ftree-vectorize", "-march=native", "-ffp-contract=off", "-fPIC", "-Wall", "-Wextra"]


def run(command: Sequence[str | Path]) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def cached(
    folder: Path, name: str, inputs: Iterable[Path], settings: Sequence[str], make: Callable[[Path], None]
) -> Path:
    """The file ``name`` made of ``inputs`` with ``settings``: found in ``folder``, or made there."""
    stem, _, suffix = name.rpartition(".")
    key = hashlib.sha256("\0".join([*settings, _host()]).encode())
    for path in sorted(inputs):
        key.update(path.name.encode() + b"\0" + path.read_bytes())
    target = folder / f"{stem}_{key.hexdigest()[:16]}.{suffix}"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"{stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # test processes that start together make it once
        if not target.exists():
            unfinished = folder / f"unfinished_{os.getpid()}_{target.name}"
            make(unfinished)
            unfinished.replace(target)
    return target


def _host() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def included(source: Path, directories: Sequence[Path] = ()) -> set[Path]:
    """Our own headers that a source includes, and those that they do."""
    found: set[Path] = set()
    unread = [source]
    while unread:
        file = unread.pop()
        for name in re.findall(r'^#include "([^"]+)"', file.read_text(), re.MULTILINE):
            candidates = [(directory / name).resolve() for directory in (file.parent, *directories)]
            header = next((c for c in candidates if c.is_file()), None)
            if header is not None and header not in found:
                found.add(header)
                unread.append(header)
    return found


def compile_all(
    sources: Sequence[Path], flags_of: Callable[[Path], Sequence[str]], folder: Path, directories: Sequence[Path] = ()
) -> list[Path]:
    """Objects of C++ sources, two at a time."""
    compiler = os.environ.get("CXX", "g++")

    def one(source: Path) -> Path:
        def make(target: Path) -> None:
            run([compiler, *flags_of(source), "-c", source, "-o", target])

        name = f"{source.parent.name}_{source.stem}.o"
        return cached(folder, name, [source, *included(source, directories)], [compiler, *flags_of(source)], make)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, sources))


def link(name: str, objects: Sequence[Path], flags: Sequence[str], folder: Path) -> Path:
    """A shared library."""
    command = [os.environ.get("CXX", "g++"), "-shared", *objects, *flags]
    return cached(folder, name, objects, flags, lambda target: run([*command, "-o", target]) and None)


def machine(folder: Path) -> Path:
    """The machine's library."""

    def flags_of(source: Path) -> list[str]:
        # directed.cpp computes in other rounding modes.
        return [*FLAGS, "-frounding-math"] if source.stem == "directed" else FLAGS

    objects = compile_all(sorted(MACHINE.glob("*.cpp")), flags_of, folder)
    return link("libptxmachine.so", objects, [], folder)
