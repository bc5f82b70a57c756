"""What the optimiser that ``--optim`` names needs, and which arguments it would leave without a word."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from fastdpo.trainer.config import DPOConfig

# Words in the names of optimisers -> the module that has them, and what pip calls it; the first that is found counts.
_PACKAGES = {
    "galore": ("galore_torch", "galore-torch"),
    "apollo": ("apollo_torch", "apollo-torch"),
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

# Words in the names of optimisers that step while backward still runs: before the gradients are clipped, the parts of a
# batch are brought together, and anyone can see that a gradient is not finite.
_STEP_IN_BACKWARD = ("layerwise", "lomo")

# Names of optimisers -> the arguments that transformers does not hand on to them, or not for all weights: APOLLO gets
# betas and epsilon for those of optim_target_modules alone.
_BETAS = ("adam_beta1", "adam_beta2", "adam_epsilon")
_NOT_HANDED_ON = {
    "galore_adamw": ("weight_decay", *_BETAS),
    "galore_adamw_8bit": ("weight_decay", *_BETAS),
    "galore_adafactor": ("weight_decay",),
    "apollo_adamw": ("weight_decay", *_BETAS),
    "grokadamw": _BETAS,
}

# Words in the names of optimisers that work on some weights otherwise than on others.
_OF_TARGETS = ("galore", "apollo")
_WHERE = {"apollo_adamw": " for all weights"}

# Those that warm up by themselves, too, for args.warmup_steps as it was given.
_WARMING_UP = ("schedule_free_adamw", "schedule_free_sgd")

# Names of optimisers -> the classes of what they keep for a weight beside tensors, which a checkpoint is not read back
# with unless they are named.
_GALORE = ("galore_torch.galore_projector.GaLoreProjector",)
_STATE_CLASSES = {
    "galore_adamw": _GALORE,
    "galore_adamw_8bit": _GALORE,
    "galore_adafactor": _GALORE,
    "apollo_adamw": (
        "apollo_torch.random_projector.GradientProjector",
        "apollo_torch.svd_projector.GaLoreProjector",
    ),
}


def check_when_it_steps(name: str) -> None:
    """Raises ValueError for one that steps while backward runs."""
    if any(word in name for word in _STEP_IN_BACKWARD):
        raise ValueError(
            f"optim is {name!r}, which changes a weight as soon as backward reaches it: max_grad_norm and weight_decay "
            "have no effect then, a batch's parts are not summed, and a gradient that is not finite is found too late. "
            "For little memory use adamw_8bit or galore_adamw, with gradient_checkpointing and max_tokens_per_batch"
        )


def check_optimizer(args: DPOConfig) -> None:
    """Looks at ``args.optim`` and what it is given, before the data are prepared and the reference is asked.

    Raises:
        ImportError: its package is not installed.
        ValueError: it steps while backward runs; it is not given an argument that was set, or would take it for
            something else; it needs one that was not; or it keeps its state where no resumed run finds it, and would
            be resumed.
    """
    name = optimizer_name(args)
    check_when_it_steps(name)
    found = next((package for word, package in _PACKAGES.items() if word in name), None)
    if found is not None and find_spec(found[0]) is None:
        raise ImportError(f"optim is {name!r}, which needs {found[0]}: pip install {found[1]}")
    _check_arguments(name, args)
    if any(word in name for word in _OF_TARGETS) and args.optim_target_modules is None:
        raise ValueError(
            f"optim is {name!r}, which needs optim_target_modules, the layers whose weights it keeps less of: give "
            "all-linear, or parts of their names"
        )
    if name in _WARMING_UP and 0 < args.warmup_steps < 1:
        raise ValueError(
            f"warmup_steps is {args.warmup_steps:g}, a share of the run's steps, but {name} warms up by itself and is "
            f"given it as a number of steps: its first step would be {1 / args.warmup_steps:g} times as large as "
            "learning_rate says. Give the number of steps"
        )
    if name == "grokadamw" and args.save_strategy != "no" and not args.save_only_model:
        raise ValueError(
            "optim is 'grokadamw', whose state is not brought back from a checkpoint: a resumed run would be another. "
            "Set save_only_model (or save_strategy: 'no'), or use another optimiser"
        )


def _check_arguments(name: str, args: DPOConfig) -> None:
    unset = {field.name: field.default for field in fields(DPOConfig)}
    lost = [each for each in _NOT_HANDED_ON.get(name, ()) if getattr(args, each) != unset[each]]
    if lost:
        them = "it" if len(lost) == 1 else "them"
        raise ValueError(
            f"{' and '.join(f'{each} is {getattr(args, each)}' for each in lost)}, but transformers does not hand "
            f"{them} on to {name}{_WHERE.get(name, '')}: leave {them} out, or use another optimiser"
        )


def optimizer_name(args: DPOConfig) -> str:
    """``args.optim`` as it is written."""
    return str(getattr(args.optim, "value", args.optim))


def state_classes(args: DPOConfig) -> list[Any]:
    """The classes of what the optimiser keeps beside tensors, for ``torch.serialization.safe_globals``."""
    paths = [path.rpartition(".") for path in _STATE_CLASSES.get(optimizer_name(args), ())]
    return [getattr(import_module(module), name) for module, _, name in paths]


def settle_weights(optimizer: Any) -> None:
    """Puts the weights in the model that the optimiser means to be used.

    Schedule-free optimisers train at points between two averages, which the model holds until they are told that
    training rests (Defazio et al., "The Road Less Scheduled", arXiv 2405.15682: y of equation 3, where x is what is
    evaluated). A training step goes on from there.

    Args:
        optimizer: the trainer's, or None before it has one.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's is around it
    rest = getattr(inner, "eval", None)
    if callable(rest):
        rest()
