"""What ``fastdpo plan`` prints for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from fastdpo.commands.terminal import SafeConsole
from fastdpo.plan.search import Answer
from fastdpo.plan.setup import Setup
from fastdpo.plan.tracker import PARTS

# What the table calls a way of sharing.
STAGE_WORDS = {"ddp": "DDP", "zero1": "ZeRO-1", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP2"}


def words_of(setup: Setup) -> str:
    words = ["checkpointing" if setup.checkpointing else "activations kept"]
    words += [f"{str(setup.dtype).removeprefix('torch.')} weights"] if setup.dtype.itemsize < 4 else []
    words += ["offloaded"] if setup.offloading else []
    words += {"cache": ["reference cached"], "model": ["second model"]}.get(setup.reference, [])
    words += [] if setup.optim in ("adamw_torch", "adamw_torch_fused") else [setup.optim]
    return ", ".join(words)


def show(
    answers: Sequence[Answer], chosen: Answer | None, command: str | None, machine: str, of_what: str, layout: str
) -> None:
    console = SafeConsole(soft_wrap=True)
    several = answers[0].devices > 1
    console.print(f"{machine}; {of_what}, {layout} rows; GiB at the peak of a training step")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("train")
    table.add_column("how")
    if several:
        table.add_column("shared by")
    for name in (*PARTS, "total"):
        table.add_column(name, justify="right")
    table.add_column("micro-batch", justify="right")
    table.add_column("fits")
    for answer in answers:
        stage = [f"{answer.devices} x {STAGE_WORDS[answer.stage]}"] if several else []
        figures = [f"{answer.parts[name] / 2**30:.2f}" for name in PARTS]
        how_many = f"{answer.tokens:,} tokens" + ("" if answer.max_tokens is None else ", in parts")
        table.add_row(
            answer.setup.method,
            words_of(answer.setup),
            *stage,
            *figures,
            f"{answer.total / 2**30:.2f}",
            how_many,
            "yes" if answer.fits else "no",
            style="bold" if answer is chosen else None,
        )
    SafeConsole(width=None if console.is_terminal else 170).print(table)
    measured = "docs/guides/plan.md says how far from measured peaks" if machine.startswith("cpu") else "not measured"
    console.print(f"Estimates: {measured}.")
    if command is None:
        console.print("\nNothing fits: shorter sequences (--max_length), a smaller model, or more memory or devices.")
    else:
        console.print(f"\n{command}")
