"""The benchmark end to end: pairs per second and peak memory of DPO training, fastdpo and TRL's DPOTrainer.

    python bench/train.py --quick                      a look, some 2 minutes on 2 cores
    python bench/train.py --json out.json --plot out.png
    python bench/train.py --answers 2,4,7              as many answers to a prompt, and every two of them a pair; with
                                                       several numbers a table over them
    python bench/train.py --answers 4 --before FOLDER  beside another checkout of fastdpo, built
    python bench/train.py --show out.json              the tables of a run that was kept

All arms train the same model on the same pairs, and a run whose losses or gradient norms differ from TRL's has no
figures. Every run is a process of its own, the arms in turn round after round.
docs/benchmarks/end-to-end.md tells the method.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from common import machine
from common.progress import Progress
from end_to_end.arms import ARMS
from end_to_end.cases import MODELS, TrainCase, named_cases, pairs_of
from end_to_end.runner import Options, run_case
from end_to_end.tables import ANSWERS_LEGEND, LEGEND, PROFILE_LEGEND, all_tables, answers_tables, bars

DATA = Path(__file__).resolve().parents[2] / "shared/data/preferences_en.jsonl"
_QUICK_ARMS = ("trl", "trl-best", "trl-best+head", "fastdpo-cached")
_ANSWERS_ARMS = ("trl-best", "trl-best+head", "fastdpo-before", "fastdpo-cached", "fastdpo-groups")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what is measured")
    what.add_argument("--case", choices=MODELS, help="the model (default: llama-34m on the CPU, llama-1b on CUDA)")
    what.add_argument("--dtype", help="float32, bfloat16, or both with a comma (default: what suits the case)")
    what.add_argument("--data", help=f"a file of preference pairs, or made-up (default: {DATA.name}, if it is there)")
    what.add_argument("--arms", help=f"names with commas, of {', '.join(ARMS)} (default: all)")
    what.add_argument("--pairs", type=int, help="pairs of an optimiser step (default: 4)")
    what.add_argument("--answers", help="answers to a prompt, several numbers with commas: every two are a pair")
    what.add_argument("--prompts", type=int, help="prompts of an optimiser step, with --answers (default: 2)")
    what.add_argument("--system_tokens", type=int, help="tokens of a system message that all prompts begin with")
    what.add_argument("--max_length", type=int, help="most tokens of a sequence (default: 1024)")
    what.add_argument("--steps", type=int, help="optimiser steps that count")
    what.add_argument("--learning_rate", type=float)
    what.add_argument("--before", type=Path, metavar="FOLDER", help="another checkout of fastdpo, for fastdpo-before")
    how = parser.add_argument_group("how")
    how.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    how.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    how.add_argument("--rounds", type=int, help="default: 3; 1 with --quick")
    how.add_argument("--tune", choices=("on", "off"), help="try the arms' settings (default: on; off with --quick)")
    how.add_argument("--profile", choices=("on", "off"), help="a run of each arm with hooks (default: on)")
    how.add_argument("--timeout", type=float, default=3_600, help="seconds for one run (default: 3600)")
    how.add_argument("--quick", action="store_true", help="a tiny model on made-up pairs, some arms, one round")
    out = parser.add_argument_group("what is written")
    out.add_argument("--json", type=Path, help="everything: every round, machine, versions, commit")
    out.add_argument("--plot", type=Path, metavar="FILE.png", help="bars: speed, memory, where the time goes")
    out.add_argument("--show", type=Path, metavar="FILE.json", help="measure nothing: print (and --plot) what is kept")
    args = parser.parse_args(arguments)
    _check(parser, args)
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fills in what depends on other flags; ends with a message where they do not fit."""
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    args.case = args.case or ("tiny" if args.quick else "llama-1b" if args.device == "cuda" else "llama-34m")
    if args.before and not (args.before / "fastdpo").is_dir():
        parser.error(f"--before {args.before}: no checkout of fastdpo")
    args.answers = _answers(parser, args)
    args.arms = args.arms.split(",") if args.arms else _default_arms(args)
    for name in args.arms:
        if name in ARMS and ARMS[name].before and args.before is None:
            parser.error(f"--arms names {name}, which needs --before FOLDER")
    args.dtype = args.dtype.split(",") if args.dtype else None
    for name, values, known in (("arms", args.arms, ARMS), ("dtype", args.dtype or (), ("float32", "bfloat16"))):
        for value in values:
            if value not in known:
                parser.error(f"--{name} names {value!r}; it may name {', '.join(known)}")
    for name in ("pairs", "prompts", "system_tokens", "max_length", "steps", "rounds", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}; it should be at least 1")
    if args.pairs is not None and args.pairs % 4:
        parser.error(f"--pairs is {args.pairs}; it should be a multiple of 4: micro-batches of 4, 2 and 1 are tried")
    if args.data is None:
        args.data = DATA if DATA.is_file() and not args.quick else None
    elif args.data == "made-up":
        args.data = None
    else:
        args.data = Path(args.data)
        if not args.data.is_file():
            parser.error(f"--data {args.data}: there is no such file")
    if args.show and not args.show.is_file():
        parser.error(f"--show {args.show}: there is no such file")


def _answers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[int]:
    """How many answers a prompt has, case by case; none where the pairs are those of the file."""
    if args.answers is None:
        if args.prompts is not None:
            parser.error("--prompts counts prompts with --answers; without it, --pairs is what a step has")
        return []
    if args.pairs is not None:
        parser.error("--pairs is the number of prompts' pairs with --answers; give --prompts")
    numbers = args.answers.split(",")
    if not all(number.isdecimal() and int(number) >= 2 for number in numbers):
        parser.error(f"--answers is {args.answers!r}; it should be numbers of at least 2, with commas")
    return [int(number) for number in numbers]


def _default_arms(args: argparse.Namespace) -> list[str]:
    if args.answers:
        arms = _ANSWERS_ARMS
    elif args.quick:
        arms = _QUICK_ARMS
    else:
        arms = tuple(name for name, arm in ARMS.items() if not arm.groups)
    return [name for name in arms if args.before or not ARMS[name].before]


def options_for(args: argparse.Namespace) -> Options:
    return Options(
        arms=args.arms,
        rounds=args.rounds or (1 if args.quick else 3),
        tune=args.tune == "on" if args.tune else not args.quick,
        profile=args.profile != "off",
        threads=args.threads,
        data=args.data,
        timeout=args.timeout,
        before=args.before.resolve() if args.before else None,
    )


def cases_for(args: argparse.Namespace) -> list[TrainCase]:
    flags = ("pairs", "system_tokens", "max_length", "steps", "learning_rate")
    changes = {flag: getattr(args, flag) for flag in flags}
    if not args.answers:
        return named_cases(args.case, args.device, args.dtype, **changes)
    cases = []
    for answers in args.answers:
        pairs = (args.prompts or 2) * pairs_of(answers)
        cases += named_cases(args.case, args.device, args.dtype, **changes | {"answers": answers, "pairs": pairs})
    return cases


def measure(args: argparse.Namespace, command: list[str]) -> dict[str, Any]:
    """Prints the tables case by case; returns what stands in the JSON file."""
    if args.threads:
        torch.set_num_threads(args.threads)
    report: dict[str, Any] = machine.facts_of_run(command, args.device) | {"cases": []}
    print(_title(report))
    if warning := machine.warn_of_load(report["machine"]):
        print(f"{warning}\n")
    if args.data is None:
        print("The pairs are made up, and their lengths nobody's: for figures, give --data.\n")
    progress = Progress()
    for case in cases_for(args):
        try:
            found = run_case(case, options_for(args), lambda what, case=case: progress.say(f"{_name(case)}: {what}"))
        finally:
            progress.stop()
        found["bars"] = bars(found)
        report["cases"].append(found)
        if args.json:  # after every case: a run that is broken off leaves what it has
            args.json.write_text(json.dumps(report, indent=1) + "\n")
        print(all_tables(found), end="\n\n", flush=True)
    return report


def _name(case: TrainCase) -> str:
    return case.dtype if case.answers == 2 else f"{case.answers} answers, {case.dtype}"


def _title(report: dict[str, Any]) -> str:
    return f"{machine.describe(report['machine'])}, {machine.packages(report['versions'])}\n"


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if args.show:
        report = json.loads(args.show.read_text())
        print(_title(report))
        for found in report["cases"]:
            print(all_tables(found), end="\n\n")
    else:
        report = measure(args, sys.argv if arguments is None else ["bench/train.py", *arguments])
    if over_answers := answers_tables(report["cases"]):
        print(f"{over_answers}\n\n{ANSWERS_LEGEND}\n")
    print(f"{LEGEND}\n\n{PROFILE_LEGEND}")
    if args.plot:
        from end_to_end.plot import plot_cases

        plot_cases(report["cases"], machine.describe(report["machine"]), args.plot)
    return int(any(arm["status"] == "failed" for found in report["cases"] for arm in found["arms"].values()))


if __name__ == "__main__":
    sys.exit(main())
