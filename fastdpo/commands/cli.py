"""The command ``fastdpo``: what a person types, and what a person reads when it goes wrong.

Commands are imported when they run, after their flags have been read, so that help does not wait for torch or
transformers.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version

from fastdpo.commands.help_page import HelpPage
from fastdpo.commands.launching import LaunchAskedError, launch, typed_words
from fastdpo.commands.quick_help import print_help
from fastdpo.commands.quiet import hush_other_libraries
from fastdpo.commands.streams import ReaderGoneError, open_what_is_closed, safe_streams
from fastdpo.data.visible import visible
from fastdpo.errors import BAD_INPUT, INTERRUPTED, RANK_LOST, READER_GONE, LostRankError, Stopped, UsageError

EPILOG = """\
example:
  fastdpo train --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name pairs.jsonl --output_dir my-model

  pairs.jsonl holds one pair a line: {"prompt": "...", "chosen": "...", "rejected": "..."}

`fastdpo train --help` lists the flags, which are those of `trl dpo`.
"""

# For these, what is printed is beside the point: they go on when nobody reads it.
_LEAVE_FILES = ("train", "cache-ref", "eval", "merge", "demo")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the words after ``fastdpo``; ``sys.argv[1:]`` if None.

    Returns:
        The exit code: 0, 1 for a training that diverged, 2 for bad input, 130 after Ctrl-C, 143 after SIGTERM or
        SIGUSR1, 129 after SIGHUP, 75 where another process of the run was lost, 141 where nobody reads standard output
        any more and there was nothing else to do. ``--help`` and ``--version`` return 0. Errors that are not about the
        input propagate.
    """
    if argv is None:
        open_what_is_closed()
    try:
        args = _make_parser().parse_args(typed_words(sys.argv[1:]) if argv is None else argv)
    except SystemExit as exit_:
        return _exit_code(exit_)
    hush_other_libraries()
    try:
        with safe_streams(goes_on=args.command in _LEAVE_FILES, for_good=argv is None):
            return _run(args)
    except ReaderGoneError:
        return READER_GONE


def _run(args: argparse.Namespace) -> int:
    show_traceback = args.debug or os.environ.get("FASTDPO_TRACEBACK", "") not in ("", "0")
    try:
        code: int = args.run(args.rest)
        return code
    except SystemExit as exit_:
        return _exit_code(exit_)
    except LaunchAskedError as asked:
        if show_traceback:
            os.environ["FASTDPO_TRACEBACK"] = "1"
        launch(asked, args.command, args.rest)
    except UsageError as error:
        if show_traceback:
            raise
        from fastdpo.trainer.secrets import redacted

        print(f"fastdpo {args.command}: error: {visible(redacted(str(error)))}", file=sys.stderr)
        return BAD_INPUT
    except LostRankError as error:
        if show_traceback:
            raise
        print(f"fastdpo {args.command}: {visible(str(error))}", file=sys.stderr)
        return RANK_LOST
    except KeyboardInterrupt as error:
        if show_traceback:
            raise
        by = f" by {error}" if isinstance(error, Stopped) else ""
        print(f"\nfastdpo {args.command}: stopped{by}.", file=sys.stderr)
        return error.exit_code if isinstance(error, Stopped) else INTERRUPTED


def _exit_code(exit_: SystemExit) -> int:
    """How argparse ends ``--help``, ``--version`` and its own errors; anybody else's goes on."""
    if isinstance(exit_.code, int):
        return exit_.code
    raise exit_


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastdpo",
        description="Preference training (DPO) with fused kernels.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastdpo {_version()}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks; also FASTDPO_TRACEBACK=1")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    _add_command(commands, "train", "train a model on preference pairs", _train)
    _add_command(commands, "check-data", "what training would make of a file of pairs, without training", _check_data)
    _add_command(commands, "plan", "what memory a training will need, and what fits, before weights are loaded", _plan)
    _add_command(commands, "cache-ref", "compute the reference's log-probabilities once, to disk", _cache_ref)
    _add_command(commands, "eval", "whether a model is better, on held-out pairs, and how sure that is", _eval)
    _add_command(commands, "compare", "completions of several models side by side, for given prompts", _compare)
    _add_command(commands, "chat", "talk to a model, or to several side by side", _chat)
    _add_command(commands, "merge", "an adapter and its base become one model, for others to load", _merge)
    _add_command(commands, "export", "whether vLLM and llama.cpp take an adapter as it is", _export)
    _add_command(commands, "demo", "a whole run from nothing, to see what preference training does", _demo)
    _add_command(commands, "info", "what was built and is used here; with --check, whether it computes right", _info)
    return parser


def _add_command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str, run: Callable[[list[str]], int]
) -> None:
    """A command that reads the words after its name by itself, ``--help`` among them."""
    command = commands.add_parser(name, help=text, add_help=False, prefix_chars="\0")
    command.add_argument("rest", nargs=argparse.REMAINDER)
    command.set_defaults(run=run)


def _train(argv: list[str]) -> int:
    if print_help("train", argv, _train_page):
        return 0
    from fastdpo.commands.train import run

    return run(argv)


def _train_page() -> HelpPage:
    from fastdpo.commands.flags import TrainParser

    return TrainParser().help_page()


def _check_data(argv: list[str]) -> int:
    from fastdpo.commands.check_data_flags import make_parser

    args = make_parser().parse_args(argv)
    from fastdpo.commands.check_data import run

    return run(args)


def _plan(argv: list[str]) -> int:
    if print_help("plan", argv, _plan_page):
        return 0
    from fastdpo.commands.plan import run

    return run(argv)


def _plan_page() -> HelpPage:
    from fastdpo.commands.plan_flags import PlanParser

    return PlanParser().help_page()


def _cache_ref(argv: list[str]) -> int:
    if print_help("cache-ref", argv, _cache_ref_page):
        return 0
    from fastdpo.commands.cache_ref import run

    return run(argv)


def _cache_ref_page() -> HelpPage:
    from fastdpo.commands.cache_ref import CacheRefParser

    return CacheRefParser().help_page()


def _eval(argv: list[str]) -> int:
    if print_help("eval", argv, _eval_page):
        return 0
    from fastdpo.commands.evaluate import run

    return run(argv)


def _eval_page() -> HelpPage:
    from fastdpo.commands.evaluation_flags import EvalParser

    return EvalParser().help_page()


def _compare(argv: list[str]) -> int:
    from fastdpo.commands.generation_flags import make_compare_parser

    args = make_compare_parser().parse_args(argv)
    from fastdpo.commands.compare import run

    return run(args)


def _chat(argv: list[str]) -> int:
    from fastdpo.commands.generation_flags import make_chat_parser

    args = make_chat_parser().parse_args(argv)
    from fastdpo.commands.chat import run

    return run(args)


def _merge(argv: list[str]) -> int:
    from fastdpo.commands.merge_flags import make_parser

    args = make_parser().parse_args(argv)
    from fastdpo.commands.merge import run

    return run(args)


def _export(argv: list[str]) -> int:
    from fastdpo.commands.export_flags import make_parser

    args = make_parser().parse_args(argv)
    from fastdpo.commands.export import run

    return run(args)


def _demo(argv: list[str]) -> int:
    from fastdpo.demo import main as demo

    return demo(argv)


def _info(argv: list[str]) -> int:
    from fastdpo.commands.info import run

    return run(argv)


def _version() -> str:
    try:
        return version("fastdpo")
    except PackageNotFoundError:
        return "(not installed)"
