"""``fastdpo check-data``: what training would make of a file of pairs, to be read before anything is trained."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from transformers import AutoTokenizer

from fastdpo.data.account import nothing_left_message, strict_message
from fastdpo.data.files import TOKEN_COLUMNS, load_preferences
from fastdpo.data.fix import Fixed, write_fixed
from fastdpo.data.prepare import TRUNCATION_MODES, examine
from fastdpo.data.settings import SCORES
from fastdpo.data.templates import read_template
from fastdpo.data.view import legend, show_row, worst_rows
from fastdpo.errors import UsageError, bad_input

EPILOG = """\
Prints how many pairs are kept, how many are dropped and why, their lengths in tokens, and what a training step costs
with padded rows and with packed ones; then a row for each doubt, as it is written and beside it as it is rendered,
coloured by what is scored and what is not. All that a row says is looked for in what is rendered of it, and what is
scored is decoded. Nothing is trained, and no weights are loaded. docs/data-checks.md describes every doubt.

exit code: 0 if the pairs can be trained on; 2 if not, or, with --strict, if any is dropped or doubtful.

examples:
  fastdpo check-data pairs.jsonl --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct
  fastdpo check-data pairs.jsonl --model_name_or_path ./my-model --max_length 2048 --strict --rows 20
  fastdpo check-data pairs.jsonl --model_name_or_path ./my-model --fix cleaned.jsonl
"""


def run(argv: list[str]) -> int:
    """Run ``fastdpo check-data``.

    Args:
        argv: the words after ``fastdpo check-data``.

    Returns:
        0.

    Raises:
        UsageError: the pairs, the tokenizer or the flags cannot be used; or, with ``--strict``, there are doubts.
    """
    try:
        args = _make_parser().parse_args(argv)
    except SystemExit as exit_:  # --help, and argparse's own errors
        return int(exit_.code or 0)
    console = Console(highlight=False)
    with bad_input():
        dataset = load_preferences(args.file, split=args.dataset_train_split, config_name=args.dataset_config)
    if set(TOKEN_COLUMNS) <= set(dataset.column_names):
        raise UsageError(f"{args.file} holds token ids already; check the file that they were made from.")
    with bad_input(f"--model_name_or_path {args.model_name_or_path}"):
        tokenizer = AutoTokenizer.from_pretrained(
            args.model_name_or_path, revision=args.model_revision, trust_remote_code=args.trust_remote_code
        )
    with bad_input():
        if args.chat_template_path:
            tokenizer.chat_template = read_template(args.chat_template_path)
        tokenised, kept, summary = examine(
            dataset,
            tokenizer,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            num_proc=args.dataset_num_proc,
            batch_size=args.per_device_train_batch_size,
            score=args.score,
            end_token=args.end_token,
            template_date=args.template_date,
        )
    console.print(summary.table())
    # Sound data shows its first row, so that one sees the mask.
    rows = worst_rows(summary, args.rows) or kept[: min(1, args.rows)].tolist()
    if rows:
        console.print("\n[bold]Rows to look at[/]", legend(), sep="\n")
    for row in rows:
        console.print(show_row(row, dataset[row], tokenised[row], tokenizer, summary))
    if args.fix:
        with bad_input(f"--fix {args.fix}"):
            _say_what_was_fixed(args.fix, write_fixed(dataset, tokenised, kept, Path(args.fix)), console)
    if not len(kept):
        raise UsageError(nothing_left_message(summary))
    if args.strict and summary.doubts():
        raise UsageError(strict_message(summary))
    doubtful = f", {sum(summary.warned.values())} doubts" if summary.warned else ""
    console.print(f"{len(kept)} of {summary.rows_in} pairs can be trained on{doubtful}.")
    return 0


def _say_what_was_fixed(name: str, fixed: Fixed, console: Console) -> None:
    left_out = ", ".join(f"{count} {reason}" for reason, count in fixed.left_out.items())
    columns = f" Columns of types that JSON does not have: {', '.join(fixed.columns_left_out)}."
    console.print(
        f"{name}: {fixed.rows} rows{f'; left out: {left_out}' if left_out else ''}."
        f"{columns if fixed.columns_left_out else ''}",
        soft_wrap=True,
    )


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastdpo check-data",
        description="What training would make of a file of preference pairs, without training.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("file", help="pairs: a .jsonl, .json, .parquet or .csv file, a folder, or a Hub dataset")
    flag = parser.add_argument
    flag(
        "--model_name_or_path", required=True, help="model whose tokenizer and chat template to use: a Hub id or folder"
    )
    flag("--model_revision", default="main", help="branch, tag or commit of the model on the Hub (default: main)")
    flag("--trust_remote_code", action="store_true", help="run Python code that comes with the tokenizer")
    flag("--dataset_config", help="configuration of the dataset, where it has several")
    flag("--dataset_train_split", default="train", help="split, or slice of one (default: train)")
    flag(
        "--max_length", type=_length, default=1024, help="most tokens of prompt and completion, or none (default: 1024)"
    )
    flag("--truncation_mode", default="keep_start", choices=TRUNCATION_MODES, help="which end of a long row to keep")
    flag("--per_device_train_batch_size", type=_count, default=8, help="pairs a step, for its cost (default: 8)")
    flag("--dataset_num_proc", type=_count, help="processes to tokenize with")
    flag("--rows", type=int, default=6, help="how many rows to show at most (default: 6)")
    flag(
        "--score",
        default="assistant",
        choices=SCORES,
        help="which answers of a completion that has several turns are scored (default: assistant, all of them)",
    )
    flag("--end_token", help="special token to append to answers after which the chat template writes none")
    flag(
        "--chat_template_path",
        help="chat template to use: a Jinja file, or one of TRL's by name (glm4moe_training)",
    )
    flag("--template_date", help="what chat templates that write the date take for today: 2026-03-01 (default: today)")
    flag("--fix", metavar="OUT.jsonl", help="write the pairs that are left, with what was put right, to this file")
    flag("--strict", action="store_true", help="any dropped or doubtful pair is an error")
    return parser


def _length(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: it should be at least 1")
    return value
