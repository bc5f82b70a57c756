"""Where the memory of CPU tensors is taken from: what a training then holds at its peak, and what that costs in time.

    python bench/cpu_memory.py
    python bench/cpu_memory.py --repeats 5 --json cpu-memory.json

Compared are torch's own allocator, the same with glibc's malloc handing every block of a size back to the system at
once (MALLOC_MMAP_THRESHOLD_), and fastdpo's, which `fastdpo train` takes on a CPU (csrc/cpu/tensor_memory.cpp). Each
way trains the same runs in a process of its own; one way follows another, and then all of them again, so that what else
the machine does falls on each of them. Figures are medians; seconds are those of all cores, which other work disturbs
less than the clock on the wall.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import machine
from common.jobs import run_job
from common.progress import Progress
from common.tables import align
from end_to_end.planned import MODELS, PlanCase, job_of

# Of what a flag says: torch's allocator, thresholds of malloc's in KiB, ours.
WAYS: dict[str, str | int] = {"torch": "torch", "128": 128 << 10, "1024": 1 << 20, "4096": 4 << 20, "ours": "ours"}


def cases_of(model: str) -> list[PlanCase]:
    return [
        PlanCase(model, checkpointing=checkpointing, method=method, steps=4)
        for method in ("full", "lora")
        for checkpointing in (False, True)
    ]


def words_of(way: str | int) -> str:
    return f"threshold of {way >> 10:,} KiB" if isinstance(way, int) else {"torch": "torch's", "ours": "fastdpo's"}[way]


def median_of(runs: list[dict[str, Any]], name: str) -> float | None:
    """Of what is told once a run, or once a step."""
    found = [run[name] for run in runs if "failed" not in run]
    figures = [figure for one in found for figure in (one if isinstance(one, list) else [one])]
    return statistics.median(figures) if figures else None


def table_of(cases: list[PlanCase], runs: dict[str, list[list[dict[str, Any]]]]) -> str:
    """Of ``runs``, way -> for each repeat, a run of each case; beside figures, what they are of the first way's."""
    rows = [["run", "memory", "peak, MiB", "of torch's", "s a step", "of torch's"]]
    for i, case in enumerate(cases):
        first: dict[str, float | None] = {}
        for name_of_way, repeats in runs.items():
            of_case = [repeat[i] for repeat in repeats]
            cells = []
            for name, unit, digits in (("peak_bytes", 2**20, 0), ("cpu_seconds", 1, 2)):
                figure = median_of(of_case, name)
                of_first = first.setdefault(name, figure)
                if figure is None:
                    cells += ["failed", "-"]
                else:
                    cells += [f"{figure / unit:,.{digits}f}", f"{figure / of_first:.2f} x" if of_first else "-"]
            rows.append([case.name, words_of(WAYS[name_of_way]), *cells])
    return align(rows)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-9m", help="default: llama-9m")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: all")
    parser.add_argument("--repeats", type=int, default=3, help="of each run; default: 3")
    parser.add_argument("--threads", type=int, default=1, help="of each run; default: 1")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that a way may take; default: 3600")
    parser.add_argument("--json", type=Path, help="every figure, machine, versions, commit")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    command = sys.argv if arguments is None else ["bench/cpu_memory.py", *arguments]
    report = machine.facts_of_run(command, "cpu")
    progress, cases = Progress(), cases_of(args.model)
    runs: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in args.ways}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            for name in args.ways:
                progress.say(f"{repeat + 1} of {args.repeats}, {words_of(WAYS[name])}")
                job = job_of(cases, Path(folder), args.threads, WAYS[name])
                found = run_job("end_to_end.planned", job, args.timeout)
                runs[name].append(found.get("results", [found] * len(cases)))
            if args.json:
                names = [case.name for case in cases]
                args.json.write_text(json.dumps(report | {"cases": names, "runs": runs}, indent=1) + "\n")
    progress.stop()
    print(machine.describe(report["machine"]))
    print(table_of(cases, runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
