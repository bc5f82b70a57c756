"""What the optional outputs of token_logps cost: each by itself and all together, over the same call without.

    python bench/outputs.py --case small                    a table
    python bench/outputs.py --case small --json small.json  and every round

Calls with and without take turns in one process. On the CPU one thread runs and its CPU time is taken, so that others
on the machine count little. docs/benchmarks/loss-layer.md has the method.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import machine
from loss_layer.cases import HEADS, IGNORE_INDEX, Case, named_case
from loss_layer.problem import Problem
from loss_layer.tables import outputs_table
from loss_layer.tensors import make_problem

import fastdpo
from fastdpo.logps import OUTPUTS

# All are compared with the two calls without: what those two show is noise.
VARIANTS: dict[str, tuple[str, ...]] = {
    "none": (),
    **{name: (name,) for name in OUTPUTS},
    "none again": (),
    "all": tuple(OUTPUTS),
}

Timed = Callable[[Problem, tuple[str, ...]], float]


def forward(problem: Problem, outputs: tuple[str, ...]) -> None:
    """Without a graph, as for the reference."""
    with torch.no_grad():
        _logps(problem, outputs)


def step(problem: Problem, outputs: tuple[str, ...]) -> None:
    """Forward and backward, to hidden states and weight."""
    _logps(problem, outputs).sum().backward()
    problem.clear_gradients()


PASSES = {"forward": forward, "step": step}


def _logps(problem: Problem, outputs: tuple[str, ...]) -> torch.Tensor:
    options = {"ignore_index": IGNORE_INDEX, "softcap": problem.case.softcap, "outputs": outputs}
    return fastdpo.token_logps(problem.hidden, problem.weight, problem.targets, **options).logps


def timed(run: Callable[[Problem, tuple[str, ...]], None]) -> Timed:
    def on_cpu(problem: Problem, outputs: tuple[str, ...]) -> float:
        start = time.process_time()
        run(problem, outputs)
        return time.process_time() - start

    def on_cuda(problem: Problem, outputs: tuple[str, ...]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run(problem, outputs)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return lambda problem, outputs: (on_cuda if problem.case.device == "cuda" else on_cpu)(problem, outputs)


def measure(problem: Problem, seconds: Timed, rounds: int) -> dict[str, Any]:
    """All variants' seconds, round after round, and by how much the lower quartile of each exceeds that without."""
    for outputs in VARIANTS.values():
        seconds(problem, outputs)  # loads, compiles and tunes what is done once
    found: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(rounds):
        for name, outputs in VARIANTS.items():
            found[name].append(seconds(problem, outputs))
    without = lower_quartile(found["none"] + found["none again"])
    extra = {name: lower_quartile(values) / without - 1 for name, values in found.items()}
    return {"seconds": without, "extra": extra, "rounds": found}


def lower_quartile(values: list[float]) -> float:
    return sorted(values)[(len(values) - 1) // 4]


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="small", help=f"{', '.join(HEADS)}, or several with commas (default: small)")
    parser.add_argument("--pairs", type=int, help="pairs B; the batch has 2B rows")
    parser.add_argument("--length", type=int, help="tokens of a row")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=25, help="default: 25")
    parser.add_argument("--json", type=Path, help="every round, machine, versions, commit")
    args = parser.parse_args(arguments)
    args.cases = args.case.split(",")
    for name in args.cases:
        if name not in HEADS:
            parser.error(f"--case names {name!r}; it may name {', '.join(HEADS)}")
    for name in ("pairs", "length", "rounds"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} is {value}; it should be at least 1")
    return args


def run_case(case: Case, rounds: int) -> dict[str, Any]:
    problem = make_problem(case)
    passes = {name: measure(problem, timed(run), rounds) for name, run in PASSES.items()}
    sizes = {name: value for name, value in dataclasses.asdict(case).items() if name not in ("frozen", "cached")}
    return sizes | {"scored_tokens": case.scored_tokens, "passes": passes}


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    if args.device == "cpu":
        torch.set_num_threads(1)
    command = sys.argv if arguments is None else ["bench/outputs.py", *arguments]
    report = machine.facts_of_run(command, args.device) | {"cases": []}
    print(f"{machine.describe(report['machine'])}, torch {torch.__version__}, fastdpo {fastdpo.__version__}\n")
    for name in args.cases:
        case = named_case(name, args.device, pairs=args.pairs, length=args.length, dtype=args.dtype, prompt_share=0.0)
        found = run_case(case, args.rounds)
        report["cases"].append(found)
        print(outputs_table(found), end="\n\n", flush=True)
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
