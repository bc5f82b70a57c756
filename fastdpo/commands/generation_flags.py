"""The flags of ``fastdpo compare`` and ``fastdpo chat``. Nothing heavy is imported: help is answered at once."""

from __future__ import annotations

import argparse

COMPARE_EPILOG = """\
examples:
  a model before and after training, on one prompt:
    fastdpo compare --model Qwen/Qwen2.5-0.5B-Instruct --model my-model --prompt "Why is the sky blue?"

  an adapter and its base, on the prompts of a file of pairs, written down:
    fastdpo compare --model my-adapter --prompts pairs.jsonl --limit 20 --out comparison.md
"""
CHAT_HELP = "/reset forgets the conversation, /quit (or Ctrl-D) ends it."


def make_compare_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastdpo compare",
        description="Complete the same prompts with several models, and show the completions side by side.",
        epilog=COMPARE_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_model_flags(parser)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="a prompt; may be given again")
    parser.add_argument(
        "--prompts", metavar="FILE", help="prompts: .txt (one a line), .jsonl (field 'prompt'), or a file of pairs"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="of the file, the first N prompts alone")
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="prompts at a time (default: 8)")
    parser.add_argument("--out", metavar="FILE", help="also write them here: .md to read, .jsonl to go on with")
    return parser


def make_chat_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastdpo chat",
        description="Talk to a model, or to several side by side: a line from you, an answer from each.",
        epilog=CHAT_HELP,
    )
    _add_model_flags(parser)
    return parser


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
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
