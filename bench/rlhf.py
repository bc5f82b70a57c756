"""Is preference training without reinforcement learning more efficient than RLHF, and by how much?

    python bench/rlhf.py --quick                       a look: one seed, nothing tuned, under 10 minutes on 2 cores
    python bench/rlhf.py --work FOLDER --json out.json --plot FOLDER     everything; hours. It goes on where it was
    python bench/rlhf.py --show out.json               the tables of a run that was kept

Every arm starts from the same model and has to reach the same true reward on held-out prompts within the same KL. What
that cost is told part by part. docs/benchmarks/against-rlhf.md tells the protocol.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from against_rlhf.arms import ARMS
from against_rlhf.jobs import Workshop
from against_rlhf.protocol import Plan, run_exact_tier, run_text_tier
from against_rlhf.tables import LEGEND, exact_table, text_tables
from common import machine
from common.progress import Progress

from fastdpo.demo import DemoConfig

_QUICK_BASE = {"corpus_size": 6_000, "hidden_size": 128, "base_steps": 700, "base_learning_rate": 5e-3}


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what is measured")
    what.add_argument("--arms", help=f"names with commas, of {', '.join(ARMS)} (default: all)")
    what.add_argument("--tiers", default="text,exact", help="text, exact, or both with a comma (default)")
    what.add_argument(
        "--seeds", type=int, help="runs of each arm, each with pairs of its own (default: 5; 1 with --quick)"
    )
    what.add_argument("--tune", choices=("on", "off"), help="try the arms' settings (default: on; off with --quick)")
    what.add_argument("--pairs", type=int, help="labelled pairs of a seed (default: 3200; 1600 with --quick)")
    what.add_argument("--quick", action="store_true", help="a smaller model, one seed, nothing tuned")
    how = parser.add_argument_group("how")
    how.add_argument("--jobs", type=int, default=2, help="processes at a time, of one thread each (default: 2)")
    how.add_argument("--work", type=Path, help="where finished runs are kept, for a later call (default: nowhere)")
    how.add_argument("--timeout", type=float, default=7_200, help="seconds for one run (default: 7200)")
    out = parser.add_argument_group("what is written")
    out.add_argument("--json", type=Path, help="everything: every look of every run, machine, versions, commit")
    out.add_argument("--plot", type=Path, metavar="FOLDER", help="frontier.png and ledger.png")
    out.add_argument("--show", type=Path, metavar="FILE.json", help="measure nothing: print (and --plot) what is kept")
    args = parser.parse_args(arguments)
    _check(parser, args)
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fills in what depends on other flags; ends with a message where they do not fit."""
    args.arms = args.arms.split(",") if args.arms else list(ARMS)
    args.tiers = args.tiers.split(",")
    for name, values, known in (("arms", args.arms, ARMS), ("tiers", args.tiers, ("text", "exact"))):
        for value in values:
            if value not in known:
                parser.error(f"--{name} names {value!r}; it may name {', '.join(known)}")
    args.seeds = args.seeds if args.seeds is not None else 1 if args.quick else 5
    args.pairs = args.pairs if args.pairs is not None else 1_600 if args.quick else 3_200
    for name in ("seeds", "pairs", "jobs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; it should be at least 1")
    if args.show and not args.show.is_file():
        parser.error(f"--show {args.show}: there is no such file")


def measure(args: argparse.Namespace, command: list[str]) -> dict[str, Any]:
    """Prints the tables tier by tier; returns what stands in the JSON file."""
    report: dict[str, Any] = machine.facts_of_run(command, "cpu")
    print(_title(report))
    if warning := machine.warn_of_load(report["machine"]):
        print(f"{warning}\n")
    tune = args.tune == "on" if args.tune else not args.quick
    plan = Plan(arms=args.arms, seeds=args.seeds, tune=tune, pairs=args.pairs, quick=args.quick)
    demo = dataclasses.asdict(DemoConfig(**(_QUICK_BASE if args.quick else {}))) | {"output_dir": ""}
    progress = Progress()
    with tempfile.TemporaryDirectory(prefix="fastdpo-bench-") as scratch:
        workshop = Workshop(
            args.work or Path(scratch),
            {"demo": demo, "commit": report["commit"]},  # what another commit has found is not mixed in
            processes=args.jobs,
            timeout=args.timeout,
            say=progress.say,
        )
        try:
            for tier in args.tiers:
                report[tier] = (run_text_tier if tier == "text" else run_exact_tier)(plan, workshop)
                if args.json:  # after every tier: a run that is broken off leaves what it has
                    args.json.write_text(json.dumps(report, indent=1) + "\n")
        finally:
            progress.stop()
    return report


def _title(report: dict[str, Any]) -> str:
    return f"{report['machine']['cpu']}, one thread a run, {machine.packages(report['versions'])}\n"


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if args.show:
        report = json.loads(args.show.read_text())
        print(_title(report))
    else:
        report = measure(args, sys.argv if arguments is None else ["bench/rlhf.py", *arguments])
    if report.get("exact"):
        print(exact_table(report["exact"]), end="\n\n")
    if report.get("text"):
        print(text_tables(report["text"]), end=f"\n\n{LEGEND}\n")
    if args.plot:
        from against_rlhf.plot import plot_frontier, plot_ledger

        args.plot.mkdir(parents=True, exist_ok=True)
        plot_frontier(report, report["machine"]["cpu"], args.plot / "frontier.png")
        if report.get("text"):
            plot_ledger(report["text"], report["machine"]["cpu"], args.plot / "ledger.png")
    return int("FAILED" in json.dumps(_failed(report)))


def _failed(report: Any) -> list[str]:
    """Every reason for which a job has nothing to show."""
    if isinstance(report, dict):
        own = [f"FAILED: {report['failed']}"] if "failed" in report else []
        return own + [line for value in report.values() for line in _failed(value)]
    return [line for value in report for line in _failed(value)] if isinstance(report, list) else []


if __name__ == "__main__":
    sys.exit(main())
