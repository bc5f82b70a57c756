"""The models that commands were given, where they are computed, and how they draw."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from fastdpo.data.terms import first_line
from fastdpo.errors import UsageError, bad_input
from fastdpo.model.generation import Drawing, LoadedModel, load_for_generation


def check_models(models: Sequence[str], flag: str = "--model ") -> None:
    """Raises UsageError for what is clearly a path, and not there; ``flag`` is that it was given by."""
    for name in models:
        # from_pretrained takes a misspelt path for a Hub id, and complains about that.
        looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
        if looks_local and not Path(name).expanduser().is_dir():
            raise UsageError(f"{flag}{name}: no such folder.")


def check_device(name: str | None) -> None:
    """Raises UsageError for a device that is none, or not here; None for whichever there is."""
    if name is None:
        return
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"--device {name}: {first_line(str(error))}.") from error


def make_drawing(args: argparse.Namespace, batch_size: int = 1) -> Drawing:
    """How completions are drawn, by the flags."""
    with bad_input():
        return Drawing(args.max_new_tokens, args.temperature, args.seed, batch_size)


def make_loader(args: argparse.Namespace) -> Callable[[str], LoadedModel]:
    """Loads a model by its name, as the flags say; UsageError where that cannot be done."""

    def load(name: str) -> LoadedModel:
        with bad_input(f"--model {name}"):
            return load_for_generation(
                name, dtype=args.dtype, device=args.device, trust_remote_code=args.trust_remote_code
            )

    return load
