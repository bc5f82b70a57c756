"""``fastdpo compare``: the same prompts, completed by a base and a trained model, side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastdpo.commands.models import check_device, check_models, make_drawing, make_loader
from fastdpo.commands.prompts import read_prompts
from fastdpo.commands.side_by_side import compare, sides_of, table_of, write_comparisons
from fastdpo.commands.terminal import SafeConsole
from fastdpo.errors import UsageError, bad_input
from fastdpo.model.generation import Prompt

_OUT_FORMATS = (".md", ".jsonl")


def run(args: argparse.Namespace) -> int:
    """Run ``fastdpo compare``.

    Args:
        args: of its parser.

    Returns:
        0.

    Raises:
        UsageError: the flags, the prompts or a model cannot be used.
    """
    out = Path(args.out) if args.out else None
    if out is not None and out.suffix not in _OUT_FORMATS:
        raise UsageError(f"--out {out}: needed a name that ends with {' or '.join(_OUT_FORMATS)}.")
    prompts, typed = _prompts(args)
    check_models(args.model)
    check_device(args.device)
    drawing = make_drawing(args, args.batch_size)
    with bad_input():
        sides = sides_of(args.model)
    if len(sides) < 2:
        raise UsageError(f"--model {args.model[0]} is no adapter, so there is nothing beside it: give --model twice.")
    with bad_input():
        comparisons = compare(sides, prompts, drawing, make_loader(args), prompt_format=args.format, typed=typed)
    console = SafeConsole()
    for number, comparison in enumerate(comparisons, 1):
        console.print(table_of(comparison, sides, number))
    if out is not None:
        about = {name: getattr(args, name) for name in ("temperature", "max_new_tokens", "seed", "format")}
        with bad_input(f"--out {out}"):
            write_comparisons(out, comparisons, sides, about)
        console.print(f"Written to {out}.", soft_wrap=True)
    return 0


def _prompts(args: argparse.Namespace) -> tuple[list[Prompt], list[bool]]:
    """The prompts, and of each whether a person typed it."""
    if args.limit is not None and args.limit < 1:
        raise UsageError(f"--limit {args.limit}: needed at least 1.")
    if args.limit is not None and not args.prompts:
        raise UsageError("--limit would have no effect without --prompts.")
    from_file: list[Prompt] = []
    if args.prompts:
        with bad_input():
            from_file = read_prompts(args.prompts)[: args.limit]
    prompts = [*args.prompt, *from_file]
    if not prompts or not all(prompts):
        raise UsageError("a prompt is needed: --prompt TEXT, or --prompts FILE.")
    listed = bool(args.prompts) and Path(args.prompts).suffix == ".txt"
    return prompts, [True] * len(args.prompt) + [listed] * len(from_file)
