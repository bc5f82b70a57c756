"""Runs atheris over the readers, one after another, each in a process of its own.

    python tests/fuzz/readers_fuzzer.py --seconds 3600
    python tests/fuzz/readers_fuzzer.py --target lines --again build/fuzz/readers/lines/crash-...

Needs the package atheris (3.0.0 has wheels for Python 3.11 to 3.13). Coverage is of fastdpo's own code.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

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
    parser.add_argument("--seconds", type=int, default=3600, help="of all targets together")
    parser.add_argument("--target", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--folder", type=Path, default=ROOT / "build/fuzz/readers", help="for the corpora")
    parser.add_argument("--again", type=Path, nargs="+", help="run these inputs alone")
    parser.add_argument("--keep_going", action="store_true", help="after a failure begin anew, until the time is up")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args, flags = parser.parse_known_args()
    if args.inside:
        fuzz(args.target[0], flags)
    failed = []
    for target in args.target:
        folder = args.folder / target
        (folder / "corpus").mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            __file__,
            "--inside",
            "--target",
            target,
            f"-artifact_prefix={folder}/",
            "-timeout=60",
        ]
        if args.again:
            command += map(str, args.again)
        else:
            command += ["-max_len=2000", "-len_control=0", "-print_final_stats=1", str(folder / "corpus")]
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        end = time.monotonic() + args.seconds // len(args.target)
        while (left := int(end - time.monotonic())) > 0:
            print(f"== {target}", file=sys.stderr, flush=True)
            limit = [] if args.again else [f"-max_total_time={left}"]
            if subprocess.run([*command, *limit], env=environment).returncode != 0:
                failed.append(target)
            if args.again or not args.keep_going:
                break
    if failed:
        sys.exit(f"{len(failed)} failures in: {', '.join(dict.fromkeys(failed))}. What they were stands above.")


if __name__ == "__main__":
    main()
