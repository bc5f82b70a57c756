"""A libFuzzer program for a while, which both fuzzers run one after another."""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path


def add_flags(parser: argparse.ArgumentParser, *, of: str, folder: Path) -> None:
    """Those that every fuzzer has; ``of`` says what the seconds are shared by."""
    parser.add_argument("--seconds", type=int, default=3600, help=f"of all {of} together")
    parser.add_argument("--folder", type=Path, default=folder, help="for programs, corpora and inputs that failed")
    parser.add_argument("--again", type=Path, nargs="+", help="run these inputs alone")
    parser.add_argument("--keep_going", action="store_true", help="after a failure begin anew, until the time is up")


def fuzz(
    name: str, command: Sequence[str], corpus: Path, seconds: int, args: argparse.Namespace, env: Mapping[str, str]
) -> bool:
    """Run libFuzzer's program; whether it came to an end without a failure.

    Args:
        name: printed in front.
        command: the program with its own flags.
        corpus: folder of inputs to begin with, to which it adds.
        seconds: how long, unless single inputs are run again.
        args: of :func:`add_flags`.
        env: the environment.
    """
    corpus.mkdir(parents=True, exist_ok=True)
    inputs = list(map(str, args.again)) if args.again else ["-len_control=0", "-print_final_stats=1", str(corpus)]
    end, sound = time.monotonic() + seconds, True
    while (left := int(end - time.monotonic())) > 0:
        print(f"== {name}", file=sys.stderr, flush=True)
        limit = [] if args.again else [f"-max_total_time={left}"]
        sound &= subprocess.run([*command, *limit, *inputs], env=dict(env)).returncode == 0
        if args.again or not args.keep_going:
            break
    return sound


def end(failed: Sequence[str]) -> None:
    """Leaves the program with 1 where something failed."""
    if failed:
        sys.exit(f"Failures in: {', '.join(failed)}. What they were stands above.")
