"""The demo's settings, as a dataclass and as flags."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints


def _setting(default: Any, help_: str) -> Any:
    return field(default=default, metadata={"help": help_})


@dataclass(frozen=True)
class DemoConfig:
    """Everything that a run depends on."""

    output_dir: Path = _setting(Path("fastdpo-demo"), "where models, pictures and summary.json go")
    seed: int = _setting(0, "fixes corpus, models, samples and labels")
    threads: int = _setting(0, "threads to compute with; 0 for as many as torch takes by itself")

    corpus_size: int = _setting(14_400, "reviews to write for the base model")
    vocab_size: int = _setting(1024, "entries of the byte-level BPE tokenizer")
    hidden_size: int = _setting(256, "width of the Llama; a multiple of 64")
    layers: int = _setting(2, "depth of the Llama")
    base_steps: int = _setting(2200, "optimiser steps of the base model")
    base_batch_size: int = _setting(8, "reviews a step")
    base_learning_rate: float = _setting(3e-3, "peak learning rate of the base model")

    pairs: int = _setting(3200, "pairs to sample from the base model and to label")
    max_new_tokens: int = _setting(80, "most tokens of a sampled text")

    beta: float = _setting(0.1, "DPO's beta: the higher, the closer the model stays to where it began")
    steps: int = _setting(100, "optimiser steps of DPO")
    batch_size: int = _setting(32, "pairs a DPO step")
    learning_rate: float = _setting(5e-4, "peak learning rate of DPO")

    eval_prompts: int = _setting(300, "held-out prompts on which everything is measured")


# Enough to see a reward rise, in the time that a test may take. The model is too small and too briefly trained to
# stay grammatical meanwhile, and one thread is quicker than several for it.
QUICK: dict[str, Any] = {
    "threads": 1,
    "corpus_size": 3000,
    "hidden_size": 64,
    "base_steps": 300,
    "base_learning_rate": 1e-2,
    "pairs": 640,
    "max_new_tokens": 64,
    "batch_size": 16,
    "steps": 40,
    "learning_rate": 2e-3,
    "eval_prompts": 128,
}

_DESCRIPTION = """\
Preference training from beginning to end, with nothing to download, in a few minutes on a CPU.

A generator writes short reviews whose true reward (how favourable they are, as long as they are language) is known.
A small Llama learns to write such reviews; it writes pairs of them; a simulated person who goes by the true reward
says which one is better; DPO trains on these choices. Then the true reward is measured on held-out prompts, before
and after, with checks of fluency that the reward knows nothing of.
"""
_EPILOG = """\
In the output folder: rewards.png and training.png to look at; summary.json with all figures; samples.jsonl with texts
before and after; pairs.jsonl with the training pairs; base_model/ and dpo_model/, to go on with `fastdpo train`.
A later run replaces what an earlier one wrote there, and nothing else.

things to try:
  fastdpo demo --beta 0.02               a longer leash: more reward, further from the base model
  fastdpo demo --beta 0.5                a shorter one
  fastdpo demo --pairs 400               few pairs, seen often
"""


def parse_args(argv: Sequence[str] | None) -> DemoConfig:
    """Flags to settings; exits as argparse does."""
    parser = argparse.ArgumentParser(
        prog="fastdpo demo",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="everything tiny, in well under a minute; still a real run"
    )
    types = get_type_hints(DemoConfig)
    for setting in fields(DemoConfig):
        quick = f"; {QUICK[setting.name]} with --quick" if setting.name in QUICK else ""
        parser.add_argument(
            f"--{setting.name}",
            type=types[setting.name],
            default=MISSING,
            metavar=types[setting.name].__name__.upper(),
            help=f"{setting.metadata['help']} (default: {setting.default}{quick})",
        )
    args = vars(parser.parse_args(argv))
    values = QUICK if args.pop("quick") else {}
    given = {name: value for name, value in args.items() if value is not MISSING}
    config = replace(DemoConfig(), **(values | given))
    if problem := _find_problem(config):
        parser.error(problem)
    return config


def _find_problem(config: DemoConfig) -> str | None:
    for setting in fields(config):
        value = getattr(config, setting.name)
        least = {"seed": 0, "threads": 0, "eval_prompts": 8, "vocab_size": 300, "max_new_tokens": 8}.get(
            setting.name, 1
        )
        if isinstance(value, int) and value < least:
            return f"--{setting.name} is {value}; it should be at least {least}"
        if isinstance(value, float) and not value > 0:
            return f"--{setting.name} is {value}; it should be above 0"
    if config.hidden_size % 64:
        return f"--hidden_size is {config.hidden_size}; it should be a multiple of 64, the size of an attention head"
    return None
