"""The flags of ``fastdpo merge``. Nothing heavy is imported: help is answered at once."""

from __future__ import annotations

import argparse

DTYPES = ("auto", "float32", "bfloat16", "float16")
GGUF_TYPES = ("f32", "f16", "bf16", "q8_0")

EPILOG = """\
The merged model is compared with the adapter on its base, token by token, before anything is written, and again as it
is read back; a difference that rounding does not explain is an error, and nothing is left. docs/guides/serve.md tells
what is merged, and what is refused.

examples:
  a folder that vLLM, transformers and others load:
    fastdpo merge my-adapter --output_dir my-model
  a file for llama.cpp and what is built on it, in 8 bits, with or without the folder:
    fastdpo merge my-adapter --gguf my-model.gguf --gguf_type q8_0
  an adapter that was trained on a base in 4 bits, compared on its own data:
    fastdpo merge my-adapter --output_dir my-model --load_in_4bit --dataset_name pairs.jsonl
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastdpo merge",
        description="Merge an adapter into its base: a model of its own, that says what the adapter says.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "model",
        nargs="+",
        metavar="adapter",
        help="an adapter, a folder or a Hub id; several of one base are merged together. With --gguf alone, a model "
        "may stand here",
    )
    flag = parser.add_argument
    flag("--output_dir", metavar="FOLDER", help="write the merged model here, with its tokenizer and a card")
    flag("--gguf", metavar="FILE", help="write a GGUF file (Llama, Mistral, Qwen2, Qwen3, Gemma; pip install gguf)")
    flag("--gguf_type", choices=GGUF_TYPES, default=None, help="what the file's matrices are stored in (default: f16)")
    flag("--base_model", metavar="NAME", help="the base, in the place of the one that the adapter names")
    flag(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="what weights are stored in; sums are made in float32 (default: auto, as the base's are)",
    )
    flag(
        "--load_in_4bit",
        action=argparse.BooleanOptionalAction,
        help="merge into what the base's weights are in 4 bits, as it was trained on (default: as the run's folder "
        "says, where it does)",
    )
    flag("--bnb_4bit_quant_type", choices=("nf4", "fp4"), help="of --load_in_4bit (default: nf4)")
    flag("--dataset_name", metavar="FILE", help="pairs to compare on (default: made-up tokens)")
    flag("--rows", type=_count, default=None, metavar="N", help="of the pairs, the first N (default: 4)")
    flag("--max_shard_size", default="5GB", metavar="SIZE", help="of a file of weights (default: 5GB)")
    flag("--overwrite_output_dir", action="store_true", help="what is there may go, once the new one is whole")
    flag("--device", default="cpu", metavar="NAME", help="where to compute: cpu, cuda, ... (default: cpu)")
    flag("--trust_remote_code", action="store_true", help="run Python code that comes with the model")
    return parser


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}: it should be at least 1")
    return value
