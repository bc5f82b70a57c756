"""What gradient checkpointing saves and costs with packed rows, beside padded ones: peak memory and time of a step.

    python bench/checkpointing.py
    python bench/checkpointing.py --repeats 5 --json checkpointing.json

One way is trained after another and then all of them again, so that what else the machine does falls on each of them;
figures are medians. Seconds are those of all cores, which other work disturbs less than the clock on the wall.
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


def cases_of(model: str) -> list[PlanCase]:
    return [
        PlanCase(model, layout, checkpointing, steps=3)
        for layout in ("shared", "repeated", "padded")
        for checkpointing in (False, True)
    ]


def summary_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    worked = [run for run in runs if "failed" not in run]
    if not worked:
        return {"failed": runs[-1]["failed"] if runs else "did not run"}
    return {
        "peak_bytes": statistics.median(run["peak_bytes"] for run in worked),
        "seconds": statistics.median(second for run in worked for second in run["cpu_seconds"]),
        "losses": worked[-1]["losses"],
    }


def table_of(cases: list[PlanCase], summaries: dict[str, dict[str, Any]]) -> str:
    """Memory and time, and how they compare with the same rows without checkpointing."""
    rows = [["rows", "activations", "peak, MiB", "of kept", "s a step", "of kept"]]
    for kept, again in zip(cases[::2], cases[1::2], strict=True):
        first = summaries[kept.name]
        for case, words in ((kept, "kept"), (again, "computed again")):
            found = summaries[case.name]
            if "failed" in found or "failed" in first:
                rows.append([case.layout, words, str(found.get("failed", "-")), "-", "-", "-"])
                continue
            shares = [f"{found[name] / first[name]:.2f} x" for name in ("peak_bytes", "seconds")]
            figures = [f"{found['peak_bytes'] / 2**20:,.0f}", f"{found['seconds']:.2f}"]
            rows.append([case.layout, words, figures[0], shares[0], figures[1], shares[1]])
    return align(rows)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama-9m", help="default: llama-9m")
    parser.add_argument("--repeats", type=int, default=3, help="of each run; default: 3")
    parser.add_argument("--threads", type=int, default=1, help="of each run; default: 1")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that a round may take; default: 3600")
    parser.add_argument("--json", type=Path, help="every figure, machine, versions, commit")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    command = sys.argv if arguments is None else ["bench/checkpointing.py", *arguments]
    report = machine.facts_of_run(command, "cpu")
    progress, cases = Progress(), cases_of(args.model)
    runs: dict[str, list[dict[str, Any]]] = {case.name: [] for case in cases}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            progress.say(f"{repeat + 1} of {args.repeats}")
            found = run_job("end_to_end.planned", job_of(cases, Path(folder), args.threads), args.timeout)
            for case, measured in zip(cases, found.get("results", [found] * len(cases)), strict=True):
                runs[case.name].append(measured)
            if args.json:
                args.json.write_text(json.dumps(report | {"runs": runs}, indent=1) + "\n")
    progress.stop()
    print(machine.describe(report["machine"]))
    print(table_of(cases, {name: summary_of(of_one) for name, of_one in runs.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
