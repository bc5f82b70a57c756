"""How long the command takes to answer: CPU time and elapsed time of ``--help``, here and in another checkout.

    python bench/startup.py                                  this checkout
    python bench/startup.py --against FOLDER --json out.json another one beside it, and every round

Each call is a process of its own; the checkouts take turns, call by call, round after round, and figures are medians.
The first call of each is counted apart: it is the one that has the parsers of train and cache-ref describe their flags,
in a cache folder of this run. Files are in memory from a call before that.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import machine
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parents[1]
CALLS: dict[str, tuple[str, ...]] = {
    "python itself": ("-c", "pass"),
    "--help": ("-m", "fastdpo", "--help"),
    **{
        f"{command} --help": ("-m", "fastdpo", command, "--help")
        for command in (
            "train",
            "cache-ref",
            "check-data",
            "plan",
            "eval",
            "compare",
            "chat",
            "merge",
            "export",
            "demo",
            "info",
        )
    },
}


def timed_call(words: Sequence[str], checkout: Path, cache: Path) -> dict[str, Any]:
    """Seconds of one call, and what it said.

    Raises:
        RuntimeError: it failed.
    """
    environment = os.environ | {"PYTHONPATH": str(checkout), "XDG_CACHE_HOME": str(cache), "COLUMNS": "100"}
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, cwd=cache)
    elapsed, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} in {checkout} ended with {done.returncode}:\n{done.stderr}")
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {"cpu": cpu, "elapsed": elapsed, "stdout": done.stdout, "stderr": done.stderr}


def measure(checkouts: dict[str, Path], calls: dict[str, tuple[str, ...]], rounds: int) -> list[dict[str, Any]]:
    """One entry for each call and checkout: ``first`` call, and the ``rounds`` after it."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        used = Path(folder)
        for name, words in calls.items():
            for label, checkout in checkouts.items():
                (warming := used / "warming" / label).mkdir(parents=True, exist_ok=True)
                timed_call(words, checkout, warming)
                (used / label).mkdir(exist_ok=True)
                first = timed_call(words, checkout, used / label)
                found[name, label] = {"call": name, "checkout": label, "first": first, "rounds": []}
        for _ in range(rounds):
            for (name, label), entry in found.items():
                entry["rounds"].append(timed_call(calls[name], checkouts[label], used / label))
    return list(found.values())


def table_of(entries: list[dict[str, Any]]) -> Table:
    table = Table(title="Seconds of CPU time and, in brackets, elapsed")
    labels = list(dict.fromkeys(entry["checkout"] for entry in entries))
    table.add_column("call")
    for label in labels:
        table.add_column(label, justify="right")
        table.add_column("first call", justify="right")
    for name in dict.fromkeys(entry["call"] for entry in entries):
        cells = []
        for entry in (entry for entry in entries if entry["call"] == name):
            cpu, elapsed = (statistics.median(r[kind] for r in entry["rounds"]) for kind in ("cpu", "elapsed"))
            first = entry["first"]
            cells += [f"{cpu:.2f} ({elapsed:.2f})", f"{first['cpu']:.2f} ({first['elapsed']:.2f})"]
        table.add_row(name, *cells)
    return table


def what_differs(entries: list[dict[str, Any]]) -> list[str]:
    """Calls whose checkouts do not say the same, or not the same each time; and what else was printed."""
    said: dict[str, set[str]] = {}
    notes = []
    for entry in entries:
        calls = [entry["first"], *entry["rounds"]]
        said.setdefault(entry["call"], set()).update(call["stdout"] for call in calls)
        for line in dict.fromkeys(line for call in calls for line in call["stderr"].splitlines()):
            notes.append(f"{entry['checkout']}, {entry['call']}, on stderr: {line}")
    return [f"{name}: not always the same text" for name, texts in said.items() if len(texts) > 1] + notes


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout, built")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--json", type=Path, help="every round, machine, versions, commit")
    args = parser.parse_args(arguments)
    if args.rounds < 1:
        parser.error(f"--rounds is {args.rounds}; it should be at least 1")
    if args.against and not (args.against / "fastdpo").is_dir():
        parser.error(f"--against {args.against}: no checkout of fastdpo")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    checkouts = {"here": HERE} | ({"against": args.against.resolve()} if args.against else {})
    command = sys.argv if arguments is None else ["bench/startup.py", *arguments]
    report = machine.facts_of_run(command, "cpu")
    console = Console(highlight=False)
    console.print(machine.describe(report["machine"]))
    if warning := machine.warn_of_load(report["machine"]):
        console.print(warning)
    report["calls"] = measure(checkouts, CALLS, args.rounds)
    console.print(table_of(report["calls"]))
    for line in what_differs(report["calls"]):
        console.print(line, soft_wrap=True)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
