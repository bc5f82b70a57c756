"""What `fastdpo plan` estimates, against what training takes: peak memory of the same runs on this CPU.

    python bench/plan.py                      every case
    python bench/plan.py --only llama,lora    those whose name has one of these words
    python bench/plan.py --json plan.json     and every figure

They are trained one after another in another process (end_to_end/planned.py says how their peaks are measured), and
estimated here, from their configurations and lengths alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import machine
from common.jobs import run_job
from common.progress import Progress
from common.tables import align
from end_to_end.planned import PlanCase, job_of

from fastdpo.plan.batches import largest_part, make_collator
from fastdpo.plan.step import trace_step
from fastdpo.plan.tracker import PARTS

CASES = [
    *(
        PlanCase("llama-9m", layout, checkpointing)
        for layout in ("shared", "padded")
        for checkpointing in (False, True)
    ),
    PlanCase("llama-9m", "repeated", False),
    *(PlanCase("llama-9m", checkpointing=checkpointing, autocast=True) for checkpointing in (False, True)),
    PlanCase("llama-9m", checkpointing=False, dtype="bfloat16"),
    PlanCase("llama-9m", checkpointing=False, max_tokens=700),
    PlanCase("llama-9m", checkpointing=False, cached=True),
    PlanCase("llama-9m", checkpointing=False, optim="adamw_torch"),
    PlanCase("llama-9m", checkpointing=False, optim="sgd"),
    *(PlanCase("llama-9m", checkpointing=checkpointing, method="lora") for checkpointing in (False, True)),
    PlanCase("llama-9m", "padded", False, method="lora"),
    PlanCase("llama-9m", checkpointing=False, method="lora", autocast=True),
    PlanCase("llama-9m", checkpointing=False, method="qlora"),
    *(PlanCase("qwen2-16m", checkpointing=checkpointing) for checkpointing in (False, True)),
    PlanCase("qwen2-16m", checkpointing=False, method="lora"),
    *(PlanCase("gpt2-10m", layout, False) for layout in ("shared", "padded")),
    PlanCase("gpt2-10m"),
    *(PlanCase("mixture-12m", checkpointing=checkpointing) for checkpointing in (False, True)),
    PlanCase("mixture-12m", "padded", False),
]


def estimate(case: PlanCase) -> dict[str, int]:
    """Part of memory -> bytes at the peak."""
    collator = make_collator(
        case.layout,
        "cpu",
        max_tokens=case.max_tokens,
        max_length=None,
        truncation_mode="keep_start",
        multiple=None,
    )
    part, count = largest_part(collator, case.rows[: case.pairs])
    return trace_step(case.setup(), part, others=count > 1)


def table_of(results: list[dict[str, Any]]) -> str:
    rows = [["run", *PARTS, "estimate", "measured", "off by"]]
    for result in results:
        parts = result["estimate"]
        total, peak = sum(parts.values()), result["measured"].get("peak_bytes")
        figures = [f"{parts[name] / 2**20:,.0f}" for name in PARTS]
        told = [f"{peak / 2**20:,.0f}", f"{total / peak - 1:+.1%}"] if peak else ["failed", "-"]
        rows.append([result["name"], *figures, f"{total / 2**20:,.0f}", *told])
    return align(rows)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="words, with commas; a case's name is to have one of them")
    parser.add_argument("--threads", type=int, default=1, help="of the runs; default: 1")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds for all runs; default: 3600")
    parser.add_argument("--json", type=Path, help="every figure, machine, versions, commit")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    report = machine.facts_of_run(sys.argv if arguments is None else ["bench/plan.py", *arguments], "cpu")
    cases = [case for case in CASES if any(word in case.name for word in args.only.split(","))]
    progress, results = Progress(), []
    with tempfile.TemporaryDirectory() as folder:
        progress.say(f"{len(cases)} runs")
        of_job = run_job("end_to_end.planned", job_of(cases, Path(folder), args.threads), args.timeout)
    for case, measured in zip(cases, of_job.get("results", [of_job] * len(cases)), strict=True):
        progress.say(f"estimate: {case.name}")
        results.append({"name": case.name, "estimate": estimate(case), "measured": measured})
    if args.json:
        args.json.write_text(json.dumps(report | {"results": results}, indent=1) + "\n")
    progress.stop()
    print(table_of(results))
    print("MiB; estimates from configurations and lengths alone, peaks of processes that trained")
    return 0


if __name__ == "__main__":
    sys.exit(main())
