"""Whether the optimiser that ``--optim`` names is there."""

from __future__ import annotations

from importlib.util import find_spec

from fastdpo.trainer.config import DPOConfig

# Words in the names of optimisers -> the module that has them, and what pip calls it; the first that is found counts.
_PACKAGES = {
    "galore": ("galore_torch", "galore-torch"),
    "apollo": ("apollo_torch", "apollo-torch"),
    "lomo": ("lomo_optim", "lomo-optim"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free": ("schedulefree", "schedulefree"),
    "stable_adamw": ("optimi", "torch-optimi"),
    "adamw_torch_8bit": ("torchao", "torchao"),
    "adamw_torch_4bit": ("torchao", "torchao"),
    "8bit": ("bitsandbytes", "bitsandbytes"),
    "paged": ("bitsandbytes", "bitsandbytes"),
    "bnb": ("bitsandbytes", "bitsandbytes"),
    "lion": ("bitsandbytes", "bitsandbytes"),
    "ademamix": ("bitsandbytes", "bitsandbytes"),
}


def check_optimizer_is_there(args: DPOConfig) -> None:
    """Raises ImportError for an optimiser of a package that is not installed.

    By itself, that would be found after the data was prepared and the reference asked.
    """
    name = str(getattr(args.optim, "value", args.optim))
    found = next((package for word, package in _PACKAGES.items() if word in name), None)
    if found is not None and find_spec(found[0]) is None:
        raise ImportError(f"optim is {name!r}, which needs {found[0]}: pip install {found[1]}")
