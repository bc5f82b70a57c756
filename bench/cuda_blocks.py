"""How long the CUDA ops take with every cut into token blocks and vocabulary chunks, beside the cut they choose.

    python bench/cuda_blocks.py --json out.json
    python bench/cuda_blocks.py --case llama-3.1-8b --tokens 8192 --level 1

A line is a pass: sums (log-probabilities alone, as for a reference), direction (forward for a gradient), weight
(backward, every exponential computed again). Figures are milliseconds, medians over rounds in which all cuts take their
turn; floor is the same matrix products by the library, on whole matrices. What the ops choose is csrc/cuda/blocks.cpp's
estimate: where a line shows a cut that is faster by more than the noise, the constants there are wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import machine
from common.progress import Progress
from loss_layer.cases import HEADS
from rich.console import Console
from rich.table import Table
from torch import Tensor

PASSES = ("sums", "direction", "weight")
BLOCK_ROWS = (512, 1_024, 2_048, 4_096, 8_192)
MEMORY_MIB = (32, 64, 128, 256)
_BYTES_OF_ENTRY = 6  # of a 16-bit case at Level 0: a float32 logit, a 16-bit operand
_MULTIPLE = 128

Clock = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Cut:
    """What FASTDPO_CUDA_BLOCKS says; rows 0 leaves it to the ops."""

    rows: int
    columns: int

    @property
    def variable(self) -> str:
        return f"{self.rows},{self.columns}" if self.rows else ""


CHOSEN = Cut(0, 0)


@dataclass
class Problem:
    """Inputs of the ops: hidden [N, H] and weight [V, H] in bfloat16, targets [N] all of which are scored."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor

    @property
    def scalars(self) -> dict[str, Any]:
        known = {"ignore_index": -100, "num_scored": len(self.targets)}
        return known | {"logit_scale": 1.0, "softcap": 0.0, "temperature": 1.0}


def make_problem(tokens: int, hidden_size: int, vocab_size: int, device: str) -> Problem:
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator, device=device, dtype=torch.bfloat16)
    weight = torch.randn(vocab_size, hidden_size, generator=generator, device=device, dtype=torch.bfloat16)
    targets = torch.randint(vocab_size, (tokens,), generator=generator, device=device)
    return Problem(hidden, weight / hidden_size**0.5, targets)


def cuts_of(tokens: int, vocab_size: int) -> list[Cut]:
    """What the ops choose; and for each number of rows, the widest chunk that each amount of memory holds."""
    cuts = [CHOSEN]
    for rows in sorted({min(rows, tokens) for rows in BLOCK_ROWS}):
        widths = {(mib << 20) // (rows * _BYTES_OF_ENTRY) // _MULTIPLE * _MULTIPLE for mib in MEMORY_MIB}
        cuts += [Cut(rows, columns) for columns in sorted({min(width, vocab_size) for width in widths}) if columns]
    return cuts


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def calls(ops: Any, problem: Problem) -> dict[str, Callable[[], Any]]:
    """A pass's op, with what it needs from the passes before it."""

    def forward(need_direction: bool) -> Any:
        return ops.token_logps_forward(
            problem.hidden,
            problem.weight,
            problem.targets,
            None,
            **problem.scalars,
            need_direction=need_direction,
            retain_bytes=0,
            entropy=False,
            log_sum_sq_probs=False,
            mean_logits=False,
            top_gap=False,
        )

    _, row_state, direction, retained, *_ = forward(need_direction=False)
    grad_logps = torch.linspace(-1, 1, len(problem.targets), device=problem.hidden.device)

    def backward() -> Any:
        return ops.token_logps_backward(
            grad_logps,
            problem.hidden,
            problem.weight,
            problem.targets,
            None,
            row_state,
            direction,
            retained,
            None,
            None,
            **problem.scalars,
            need_hidden=False,
            need_weight=True,
            need_bias=False,
        )

    return {"sums": lambda: forward(False), "direction": lambda: forward(True), "weight": backward}


def floors(problem: Problem) -> dict[str, Callable[[], Any]]:
    """The products of each pass."""
    logits = problem.hidden @ problem.weight.T

    def first() -> Tensor:
        return torch.mm(problem.hidden, problem.weight.T, out=logits)

    return {
        "sums": first,
        "direction": lambda: first() @ problem.weight,
        "weight": lambda: first().T @ problem.hidden,
    }


def device_clock(work: Callable[[], Any]) -> float:
    """Seconds by the device's events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def sweep(ops: Any, problem: Problem, cuts: list[Cut], rounds: int, clock: Clock) -> list[dict[str, Any]]:
    """For every pass the floor's seconds and those of every cut, whose turns follow each other in every round."""
    of_floor = floors(problem)
    lines = []
    for name, call in calls(ops, problem).items():
        seconds: dict[Cut | None, list[float]] = {cut: [] for cut in [None, *cuts]}
        for turn in range(rounds + 1):
            for cut, found in seconds.items():
                with environment(FASTDPO_CUDA_BLOCKS=cut.variable if cut else ""):
                    took = clock(call if cut else of_floor[name])
                if turn > 0:  # the first one warms up
                    found.append(took)
        medians = {cut: statistics.median(found) for cut, found in seconds.items()}
        of_cuts = [asdict(cut) | {"seconds": medians[cut]} for cut in cuts]
        lines.append({"pass": name, "floor_seconds": medians[None], "cuts": of_cuts})
    return lines


def table(title: str, lines: list[dict[str, Any]]) -> Table:
    """Milliseconds: a row for each block, a column for each pass, and in a cell the chunks from narrow to wide."""
    printed = Table(title=title, title_justify="left")
    printed.add_column("tokens a block: entries a chunk")
    for line in lines:
        printed.add_column(line["pass"], justify="right")
    printed.add_row("floor", *(f"{1e3 * line['floor_seconds']:.2f}" for line in lines))
    for i, cut in enumerate(lines[0]["cuts"]):
        name = f"{cut['rows']:,}: {cut['columns']:,}" if cut["rows"] else "as chosen"
        printed.add_row(name, *(_cell(line, line["cuts"][i]) for line in lines))
    return printed


def _cell(line: dict[str, Any], cut: dict[str, Any]) -> str:
    best = min(other["seconds"] for other in line["cuts"])
    mark = "*" if cut["seconds"] == best else " "
    return f"{1e3 * cut['seconds']:.2f} ({cut['seconds'] / line['floor_seconds']:.2f}){mark}"


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="llama-3.1-8b,qwen2.5-0.5b", help="heads with commas (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=8_192, help="all scored (default: %(default)s)")
    parser.add_argument("--level", default="0", choices=("0", "1"), help="FASTDPO_CUDA_LEVEL (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--chosen", action="store_true", help="the cut that the ops choose alone: for a profiler")
    parser.add_argument("--json", type=Path, help="everything, with machine, versions and commit")
    args = parser.parse_args(arguments)
    for name in args.case.split(","):
        if name not in HEADS:
            parser.error(f"--case names {name!r}; it may name {', '.join(HEADS)}")
    for name in ("tokens", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; it should be at least 1")
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device, and the cut of other devices' work is not this")
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    console, progress = Console(width=100), Progress()
    with environment(FASTDPO_CUDA_LEVEL=args.level):
        report = machine.facts_of_run(sys.argv if arguments is None else ["bench/cuda_blocks.py", *arguments], "cuda")
        report |= {"tokens": args.tokens, "cases": {}}
        console.print(machine.describe(report["machine"]))
        for name in args.case.split(","):
            progress.say(name)
            hidden_size, vocab_size, _ = HEADS[name]
            problem = make_problem(args.tokens, hidden_size, vocab_size, "cuda")
            cuts = [CHOSEN] if args.chosen else cuts_of(args.tokens, vocab_size)
            lines = sweep(torch.ops.fastdpo, problem, cuts, args.rounds, device_clock)
            report["cases"][name] = lines
            progress.stop()
            console.print(table(f"{name}, {args.tokens:,} tokens, Level {args.level}: ms (over the floor)", lines))
            if args.json:
                args.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
