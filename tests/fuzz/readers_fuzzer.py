"""Runs atheris over the readers, one after another, each in a process of its own.

    python tests/fuzz/readers_fuzzer.py --seconds 3600
    python tests/fuzz/readers_fuzzer.py --target lines --again build/fuzz/readers/lines/crash-...

Needs the package atheris (3.0.0 has wheels for Python 3.11 to 3.13). Coverage is of fastdpo's own code.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import fuzz_loop

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("lines", "tables", "formats", "whole", "prompts", "configuration", "cache", "states")


def fuzz(target: str, flags: list[str]) -> None:
    """Never returns: libFuzzer ends the process."""
    import atheris

    with atheris.instrument_imports(include=["fastdpo"]):
        import datasets
        from fuzz_targets import ROOM, TARGETS
    from fuzz_values import Source

    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = ROOM / "cache"
    run = TARGETS[target]
    atheris.Setup([sys.argv[0], *flags], lambda data: run(Source(data)))
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    fuzz_loop.add_flags(parser, of="targets", folder=ROOT / "build/fuzz/readers")
    parser.add_argument("--target", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    if args.inside:
        fuzz(args.target[0], flags)
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    failed = []
    for target in args.target:
        folder = args.folder / target
        command = [sys.executable, __file__, "--inside", "--target", target]
        command += [f"-artifact_prefix={folder}/", "-timeout=60", "-max_len=2000"]
        seconds = args.seconds // len(args.target)
        if not fuzz_loop.fuzz(target, command, folder / "corpus", seconds, args, environment):
            failed.append(target)
    fuzz_loop.end(failed)


if __name__ == "__main__":
    main()
