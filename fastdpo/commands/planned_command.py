"""The command line that trains as ``fastdpo plan`` found that it fits."""

from __future__ import annotations

import shlex
from typing import Any

from fastdpo.commands.flags import TAKES_NONE
from fastdpo.plan.search import Answer
from fastdpo.plan.setup import Setup
from fastdpo.report.facts import changed_settings

# Stands for data that are not there yet.
PAIRS = "pairs.jsonl"

# How the command is told of what processes share (see commands/profiles).
_PROFILES = {"ddp": "multi_gpu", "zero1": "zero1", "zero2": "zero2", "zero3": "zero3", "fsdp2": "fsdp2"}


def command_for(answer: Answer, asked: Setup, flags: dict[str, tuple[Any, Any]], leave_out: set[str]) -> str:
    """What to type.

    Args:
        answer: what fits.
        asked: the run as the flags have it.
        flags: name -> (value, default) of all.
        leave_out: names of those that training does not have.
    """
    values = {name: value for name, (value, _) in changed_settings(flags).items() if name not in leave_out}
    if not (values.get("dataset_name") or values.get("datasets")):
        values["dataset_name"] = PAIRS
    values |= _changes(answer, asked, flags)
    said = {name: value for name, value in values.items() if value is not None or name in TAKES_NONE}
    words = [word for name, value in said.items() for word in _words(name, value, flags)]
    if answer.devices > 1:
        words += ["--num_processes", str(answer.devices), "--accelerate_config", _PROFILES[answer.stage]]
    return shlex.join(["fastdpo", "train", *words])


def _changes(answer: Answer, asked: Setup, flags: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    """name -> value of what the answer has otherwise than the flags."""
    setup = answer.setup
    changes: dict[str, Any] = {}
    if setup.checkpointing != asked.checkpointing:
        changes["gradient_checkpointing"] = setup.checkpointing
    if setup.reference == "cache" != asked.reference:
        changes["precompute_ref_log_probs"] = True
    if setup.optim != asked.optim:
        changes["optim"] = setup.optim
    if setup.peft_config is not None and asked.peft_config is None:
        changes["use_peft"] = True
    if setup.dtype != asked.dtype:
        changes["dtype"] = str(setup.dtype).removeprefix("torch.")
    if setup.bits == 4 and asked.bits is None:
        changes["load_in_4bit"] = True
    if answer.max_tokens != flags["max_tokens_per_batch"][0]:
        changes["max_tokens_per_batch"] = answer.max_tokens
    return changes


def _words(name: str, value: Any, flags: dict[str, tuple[Any, Any]]) -> list[str]:
    if value is True:
        return [f"--{name}"]
    if value is False:
        return [f"--no_{name}"]
    if isinstance(value, (list, tuple)):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", str(getattr(value, "value", value))]
