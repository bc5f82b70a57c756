"""build.ninja, and its run: a line on the screen for every file that was compiled."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# How ninja begins a line about a step, which is what is looked for in its output.
_STATUS = {"NINJA_STATUS": "[%f/%t] "}


def ninja_path() -> str:
    """The ninja executable: the pip package's, for an isolated build does not put it on PATH."""
    import ninja

    return str(Path(ninja.BIN_DIR) / "ninja")


def from_root(path: Path) -> Path:
    """As it is written in build.ninja, which runs in ROOT: objects name no folder of the machine that they are made on,
    and a checkout that is moved is not compiled again."""
    path = Path(path)
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


class NinjaFile:
    """Collects rules and edges, and writes build.ninja."""

    def __init__(self) -> None:
        self.lines = ["ninja_required_version = 1.10"]

    def rule(self, name: str, command: list[str], *, depfile: bool = False) -> None:
        self.lines += [f"rule {name}", f"  command = {' '.join(command)}", "  description = $shown"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def pool(self, name: str, depth: int) -> None:
        self.lines += [f"pool {name}", f"  depth = {depth}"]

    def edge(
        self, rule: str, output: Path, inputs: Sequence[Path], *, after: Sequence[Path] = (), **variables: str
    ) -> Path:
        """``after``: what has to be there before, without being among the command's inputs."""

        def escape(path: Path) -> str:
            return str(from_root(path)).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

        implicit = f" | {' '.join(map(escape, after))}" if after else ""
        self.lines.append(f"build {escape(output)}: {rule} {' '.join(map(escape, inputs))}{implicit}")
        shown = {"shown": str(from_root(output if rule == "link" else inputs[0]))}
        self.lines += [f"  {name} = {value}" for name, value in (shown | variables).items()]
        return output

    def run(self, folder: Path, advice: Callable[[list[str]], str | None] = lambda waiting: None) -> None:
        """Makes what is not there or older than its sources. ``advice`` on what that is comes first, if any."""
        build_file = folder / "build.ninja"
        # ninja keeps its log in builddir.
        build_file.write_text("\n".join([f"builddir = {from_root(folder)}", *self.lines]) + "\n")
        jobs = os.environ.get("MAX_JOBS")
        command = [ninja_path(), "-f", str(build_file), *(["-j", jobs] if jobs else [])]
        waiting = _waiting(command)
        if not waiting:
            return
        _say(f"{len(waiting)} files to make; a line for each that is done")
        if said := advice(waiting):
            _say(said)
        begin = time.monotonic()
        if _run(command) != 0:
            sys.exit("fastdpo: the build failed; the compiler's words are above")
        _say(f"made {len(waiting)} files in {time.monotonic() - begin:.0f} s")


def _waiting(command: list[str]) -> list[str]:
    """What there is to do, as it is shown."""
    dry = subprocess.run([*command, "-n"], cwd=ROOT, env=os.environ | _STATUS, capture_output=True, text=True)
    steps = re.findall(r"^\[\d+/\d+\] (.+)$", dry.stdout, re.M)
    # A file that ninja cannot make sense of is for the real run to tell of.
    return steps or (["build.ninja"] if dry.returncode != 0 else [])


def _run(command: list[str]) -> int:
    """Hands on what ninja says line by line. To a pipe it writes a line a step, once the step is done."""
    begin = time.monotonic()
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | _STATUS, stdout=subprocess.PIPE, text=True) as ninja:
        for line in ninja.stdout:
            done = re.match(r"\[\d+/\d+\] ", line) is not None
            print(f"fastdpo: {line.rstrip()}, {time.monotonic() - begin:.0f} s\n" if done else line, end="", flush=True)
    return ninja.returncode


def _say(text: str) -> None:
    print(f"fastdpo: {text}", flush=True)
