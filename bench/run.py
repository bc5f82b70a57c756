"""The benchmark of the loss layer: forward and backward of the DPO loss from hidden states, fastdpo and its peers.

    python bench/run.py --quick                       a look, under 3 minutes on 2 cores
    python bench/run.py --case small --json out.json  a table, and everything measured
    python bench/run.py --case small --plot out.png   time and memory over tokens and over the vocabulary
    python bench/run.py --answers 4                   as many answers to a prompt, and every two of them a pair
    python bench/run.py --sweep answers               time and memory over the answers to a prompt

Every measurement runs in a process of its own, after a warm-up on the real shapes, with the peers in turn round after
round; figures are medians over the rounds. docs/benchmarks/loss-layer.md tells the method and how to read the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from common import machine
from common.progress import Progress
from loss_layer.cases import HEADS, Case, is_large, named_case, pairs_of
from loss_layer.peers import PEERS, load_peer_file
from loss_layer.runner import Options, run_case
from loss_layer.tables import LEGEND, case_table, sweep_tables

import fastdpo

SWEEPS = {
    "tokens": (512, 1_024, 2_048, 4_096, 8_192),
    "vocabulary": (8_192, 16_384, 32_768, 65_536, 131_072),
    "answers": (2, 3, 4, 6, 8),
}
BOTH = ("tokens", "vocabulary")
SWEEP_LENGTH = 256
PROMPTS = 2


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what is measured")
    what.add_argument("--case", default=None, help=f"{', '.join(HEADS)}, several with commas, or all (default: small)")
    what.add_argument("--pairs", type=int, help="pairs B; the batch has 2B rows")
    what.add_argument("--answers", type=int, help="answers to a prompt: every two are a pair")
    what.add_argument("--prompts", type=int, help=f"prompts, with --answers or --sweep answers (default: {PROMPTS})")
    what.add_argument("--length", type=int, help="tokens of a row")
    what.add_argument("--prompt_share", type=float, help="share of the positions that have no target, in [0, 1)")
    what.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    what.add_argument("--frozen", action="store_true", default=None, help="weight needs no gradient")
    what.add_argument("--cached", action="store_true", default=None, help="the reference is given as log-probabilities")
    what.add_argument("--peers", help="names with commas (default: all)")
    what.add_argument("--peer_file", help="a Python file that defines further peers")
    what.add_argument(
        "--sweep",
        choices=(*SWEEPS, "both"),
        help="tables over tokens, the vocabulary, or the answers to a prompt, at fixed rest; both: the first two",
    )
    what.add_argument("--points", help="with one --sweep: its values, with commas")
    how = parser.add_argument_group("how")
    how.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    how.add_argument("--threads", type=int, help="torch's threads (default: torch's own choice)")
    how.add_argument("--rounds", type=int, help="default: 5; 3 in sweeps and for large CPU cases; 1 with --quick")
    how.add_argument("--errors", choices=("on", "off"), help="against float64 (default: on, but off in sweeps)")
    how.add_argument(
        "--tune", choices=("on", "off"), help="try a peer's settings first (default: on; off with --quick)"
    )
    how.add_argument("--timeout", type=float, default=1_800, help="seconds for one measurement (default: 1800)")
    how.add_argument("--quick", action="store_true", help="the tiny case, one round")
    out = parser.add_argument_group("what is written")
    out.add_argument("--json", type=Path, help="everything: every round, machine, versions, commit")
    out.add_argument("--plot", type=Path, metavar="FILE.png", help="the sweep, or both sweeps, as a figure")
    args = parser.parse_args(arguments)
    _check(parser, args)
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fills in what depends on other flags; ends with a message where they do not fit."""
    if args.peer_file:
        load_peer_file(Path(args.peer_file))
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.case = args.case or ("tiny" if args.quick else "small")
    args.cases = list(HEADS) if args.case == "all" else args.case.split(",")
    args.peers = args.peers.split(",") if args.peers else list(PEERS)
    for name, values, known in (("--case", args.cases, HEADS), ("--peers", args.peers, PEERS)):
        for value in values:
            if value not in known:
                parser.error(f"{name} names {value!r}; it may name {', '.join(known)}")
    if args.prompt_share is not None and not 0 <= args.prompt_share < 1:
        parser.error(f"--prompt_share is {args.prompt_share}; it should be at least 0 and below 1")
    for name in ("pairs", "prompts", "length", "rounds", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}; it should be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    args.sweeps = list(BOTH) if args.sweep == "both" or (args.plot and not args.sweep) else [args.sweep]
    args.sweeps = [axis for axis in args.sweeps if axis]
    if args.sweeps and len(args.cases) > 1:
        parser.error("a sweep starts from one case")
    if args.points and len(args.sweeps) != 1:
        parser.error(f"--points belongs to one sweep: {', '.join(SWEEPS)}")
    _check_answers(parser, args)


def _check_answers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.answers is not None and args.answers < 2:
        parser.error(f"--answers is {args.answers}; it should be at least 2")
    if args.answers and args.sweeps:
        parser.error("--answers is of a case; over the answers goes --sweep answers")
    if args.answers or args.sweeps == ["answers"]:
        if args.pairs is not None:
            parser.error("--pairs is the number of prompts' pairs with several answers; give --prompts")
    elif args.prompts is not None:
        parser.error("--prompts counts prompts with --answers; without it, --pairs is what a batch has")


def options_for(args: argparse.Namespace, case: Case) -> Options:
    few = bool(args.sweeps) or (is_large(case.name) and case.device == "cpu")
    return Options(
        peers=args.peers,
        rounds=args.rounds or (1 if args.quick else 3 if few else 5),
        errors=args.errors == "on" if args.errors else not args.sweeps,
        tune=args.tune == "on" if args.tune else not args.quick,
        threads=args.threads,
        peer_file=args.peer_file,
        timeout=args.timeout,
    )


def make_case(name: str, args: argparse.Namespace) -> Case:
    flags = ("pairs", "length", "prompt_share", "dtype", "frozen", "cached")
    case = named_case(name, args.device, **{flag: getattr(args, flag) for flag in flags})
    return with_answers(case, args.answers, args.prompts) if args.answers else case


def with_answers(case: Case, answers: int, prompts: int | None) -> Case:
    return dataclasses.replace(case, answers=answers, pairs=(prompts or PROMPTS) * pairs_of(answers))


def sweep_cases(axis: str, case: Case, points: list[int], length: int | None, prompts: int | None = None) -> list[Case]:
    if axis == "answers":
        return [with_answers(case, point, prompts) for point in points]
    if axis == "vocabulary":
        return [dataclasses.replace(case, vocab_size=point) for point in points]
    length = length or SWEEP_LENGTH
    wrong = [point for point in points if point < 2 * length or point % (2 * length)]
    if wrong:
        sys.exit(f"tokens come in pairs of rows of {length}: {wrong[0]} is no multiple of {2 * length} (see --length)")
    return [dataclasses.replace(case, length=length, pairs=point // (2 * length)) for point in points]


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    if args.threads:
        torch.set_num_threads(args.threads)
    command = sys.argv if arguments is None else ["bench/run.py", *arguments]
    report = machine.facts_of_run(command, args.device) | {"cases": [], "sweeps": {}}
    print(f"{machine.describe(report['machine'])}, torch {torch.__version__}, fastdpo {fastdpo.__version__}\n")
    if warning := machine.warn_of_load(report["machine"]):
        print(f"{warning}\n")
    progress = Progress()

    def measure(case: Case, label: str, into: list[dict[str, Any]]) -> dict[str, Any]:
        try:
            found = run_case(case, options_for(args, case), lambda what: progress.say(f"{label}: {what}"))
        finally:
            progress.stop()
        into.append(found)
        if args.json:  # after every case: a run that is broken off leaves what it has
            args.json.write_text(json.dumps(report, indent=1) + "\n")
        return found

    everything = []
    if args.sweeps:
        case = make_case(args.cases[0], args)
        for axis in args.sweeps:
            points = [int(point) for point in args.points.split(",")] if args.points else list(SWEEPS[axis])
            found = report["sweeps"][axis] = []
            cases = sweep_cases(axis, case, points, args.length, args.prompts)
            for point, one in zip(points, cases, strict=True):
                everything.append(measure(one, f"{point:,} {axis}", found))
            print(sweep_tables(axis, found), end="\n\n", flush=True)
        if args.plot:
            from loss_layer.plot import plot_sweeps

            plot_sweeps(report["sweeps"], machine.describe(report["machine"]), args.plot)
    else:
        for name in args.cases:
            found = measure(make_case(name, args), name, report["cases"])
            everything.append(found)
            print(case_table(found), end="\n\n", flush=True)
        print(LEGEND)
    own = [found["peers"][name] for found in everything for name in ("floor", "fastdpo") if name in found["peers"]]
    return int(any(entry["status"] == "failed" for entry in own))


if __name__ == "__main__":
    sys.exit(main())
