"""The flags of ``fastdpo check-data``. Nothing heavy is imported: help, and wrong words, are answered at once."""

from __future__ import annotations

import argparse

from fastdpo.data.comparisons import PAIRS
from fastdpo.data.settings import SCORES
from fastdpo.data.truncation import TRUNCATION_MODES

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


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastdpo check-data",
        description="What training would make of a file of preference pairs, without training.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "files", nargs="+", metavar="file", help="pairs: files, folders, or a Hub dataset; docs/data.md lists formats"
    )
    flag = parser.add_argument
    flag("--format", help="format of the pairs, where it cannot be told: a name, or FILE.py:FUNCTION")
    flag("--columns", action="append", help="columns of other names: prompt=question,chosen=good,rejected=bad")
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
    flag(
        "--per_device_train_batch_size",
        type=_count,
        default=8,
        help="pairs, or groups, a step, for its cost (default: 8)",
    )
    flag("--dataset_num_proc", type=_count, help="processes to tokenize with")
    flag("--rows", type=int, default=6, help="how many rows to show at most (default: 6)")
    flag(
        "--score",
        default="assistant",
        choices=SCORES,
        help="which answers of a completion that has several turns are scored (default: assistant, all of them)",
    )
    flag("--end_token", help="special token to append to answers after which the chat template writes none")
    flag("--chat_template_path", help="chat template to use: a Jinja file, or one of TRL's by name (glm4moe_training)")
    flag("--template_date", help="what chat templates that write the date take for today: 2026-03-01 (default: today)")
    flag("--pairs", choices=PAIRS, help="rows with several ranked or scored answers: which two are compared")
    flag("--weight_by_score", action="store_true", help="count each of these pairs as much as its scores differ")
    flag("--group_by_prompt", action="store_true", help="join pairs of one prompt, each answer once")
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
