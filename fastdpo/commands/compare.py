"""``fastdpo compare``: the same prompts, completed by a base and a trained model, side by side."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from fastdpo.commands.prompts import read_prompts
from fastdpo.commands.side_by_side import compare, sides_of, table_of, write_comparisons
from fastdpo.errors import UsageError, bad_input
from fastdpo.model.generation import Drawing, LoadedModel, Prompt, load_for_generation

_OUT_FORMATS = (".md", ".jsonl")

EPILOG = """\
examples:
  a model before and after training, on one prompt:
    fastdpo compare --model Qwen/Qwen2.5-0.5B-Instruct --model my-model --prompt "Why is the sky blue?"

  an adapter and its base, on the prompts of a file of pairs, written down:
    fastdpo compare --model my-adapter --prompts pairs.jsonl --limit 20 --out comparison.md
"""


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that ``compare`` and ``chat`` share."""
    parser.add_argument(
        "--model",
        action="append",
        required=True,
        metavar="NAME",
        help="a Hub id or a folder, of a model or an adapter; once for each side. A single adapter is shown beside the "
        "model that it was trained on",
    )
    parser.add_argument(
        "--max_new_tokens", type=int, default=128, metavar="N", help="cut completions here (default: 128)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="0 takes the likeliest token each time (default); 1 draws from the model's own probabilities",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")
    parser.add_argument(
        "--format",
        choices=("auto", "chat", "text"),
        default="auto",
        help="what a prompt that is a text becomes: a user's message (chat), or nothing else (text); auto: a message "
        "where it was typed or listed in a .txt file and the model has a chat template, nothing else where it is of a "
        "file of pairs, as in training. Lists of messages are always rendered by the template",
    )
    parser.add_argument("--dtype", default="auto", metavar="TYPE", help="of the weights: auto, bfloat16, float32, ...")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, ... (default: an accelerator where there is one)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run Python code that comes with a model")


def check_models(models: Sequence[str]) -> None:
    """Raises UsageError for what is clearly a path, and not there."""
    for name in models:
        # from_pretrained takes a misspelt path for a Hub id, and complains about that.
        looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
        if looks_local and not Path(name).expanduser().is_dir():
            raise UsageError(f"--model {name}: no such folder.")


def make_drawing(args: argparse.Namespace, batch_size: int = 1) -> Drawing:
    """How completions are drawn, by the flags."""
    with bad_input():
        return Drawing(args.max_new_tokens, args.temperature, args.seed, batch_size)


def make_loader(args: argparse.Namespace) -> Callable[[str], LoadedModel]:
    """Loads a model by its name, as the flags say; UsageError where that cannot be done."""

    def load(name: str) -> LoadedModel:
        with bad_input(f"--model {name}"):
            return load_for_generation(
                name, dtype=args.dtype, device=args.device, trust_remote_code=args.trust_remote_code
            )

    return load


def run(argv: list[str]) -> int:
    """Run ``fastdpo compare``.

    Args:
        argv: the words after ``fastdpo compare``.

    Returns:
        0.

    Raises:
        UsageError: the flags, the prompts or a model cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="fastdpo compare",
        description="Complete the same prompts with several models, and show the completions side by side.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_flags(parser)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be given again")
    parser.add_argument(
        "--prompts", metavar="FILE", help="prompts: .txt (one a line), .jsonl (field 'prompt'), or a file of pairs"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="of the file, the first N prompts alone")
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="prompts at a time (default: 8)")
    parser.add_argument("--out", metavar="FILE", help="also write them here: .md to read, .jsonl to go on with")
    try:
        args = parser.parse_args(argv)
    except SystemExit as exit_:
        return int(exit_.code or 0)
    out = Path(args.out) if args.out else None
    if out is not None and out.suffix not in _OUT_FORMATS:
        raise UsageError(f"--out {out}: needed a name that ends with {' or '.join(_OUT_FORMATS)}.")
    prompts, typed = _prompts(args)
    check_models(args.model)
    drawing = make_drawing(args, args.batch_size)
    with bad_input():
        sides = sides_of(args.model)
    if len(sides) < 2:
        raise UsageError(f"--model {args.model[0]} is no adapter, so there is nothing beside it: give --model twice.")
    with bad_input():
        comparisons = compare(sides, prompts, drawing, make_loader(args), prompt_format=args.format, typed=typed)
    console = Console(highlight=False)
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
