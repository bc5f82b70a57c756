"""Whether the optimiser that ``--optim`` names is there."""

from __future__ import annotations

from importlib.util import find_spec

from fastdpo.trainer.config import DPOConfig

# Words in the names of optimisers -> the package that has them.
_PACKAGES = {
    "adamw_torch_8bit": "torchao",
    "adamw_torch_4bit": "torchao",
    "8bit": "bitsandbytes",
    "paged": "bitsandbytes",
    "bnb": "bitsandbytes",
    "lion": "bitsandbytes",
    "ademamix": "bitsandbytes",
}


def check_optimizer_is_there(args: DPOConfig) -> None:
    """Raises ImportError for an optimiser of a package that is not installed.

    By itself, that would be found after the data was prepared and the reference asked.
    """
    name = str(getattr(args.optim, "value", args.optim))
    package = next((package for word, package in _PACKAGES.items() if word in name), None)
    if package is not None and "galore" not in name and find_spec(package) is None:
        raise ImportError(f"optim is {name!r}, which needs {package}: pip install {package}")
