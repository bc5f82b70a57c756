"""The flags of ``fastdpo export``. Nothing heavy is imported: help is answered at once."""

from __future__ import annotations

import argparse

EPILOG = """\
Neither program is needed, and no weights are read. Whatever is found, `fastdpo merge` mostly does away with.

exit code: 0 if nothing is refused; 2 if something is.

example:
  fastdpo export my-adapter --check-vllm --check-llama-cpp
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastdpo export",
        description="Whether other programs take an adapter as it is, and what to do where they do not.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="adapter", help="a folder, or a Hub id")
    flag = parser.add_argument
    flag("--check-vllm", action="store_true", help="what vLLM refuses of it, or changes")
    flag("--check-llama-cpp", action="store_true", help="what llama.cpp's convert_lora_to_gguf.py refuses, or changes")
    flag("--max_lora_rank", type=int, metavar="N", help="what vLLM is started with (default: 16, as by itself)")
    return parser
