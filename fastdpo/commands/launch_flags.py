"""The flags of ``accelerate launch`` among those of a training, on a command line and in a run file, as TRL has it."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import launch_command_parser

from fastdpo.commands.launching import LaunchAskedError, is_launched, is_launched_by_others
from fastdpo.errors import UsageError

_PROFILES = Path(__file__).with_name("profiles")
# What says which engine it is; where none does, and there are several processes, it is DDP.
_ENGINES = ("cpu", "multi_gpu", "tpu", "use_deepspeed", "use_fsdp", "use_megatron_lm", "config_file")


def profiles() -> list[str]:
    """The names that ``--accelerate_config`` takes."""
    return sorted(path.stem for path in _PROFILES.glob("*.yaml"))


@functools.cache
def _accelerates() -> dict[str, argparse.Action]:
    """Name, without dashes -> what accelerate's own parser makes of it."""
    actions = launch_command_parser()._actions
    return {name[2:]: each for each in actions for name in each.option_strings if name[:2] == "--" and name != "--help"}


def takes(name: str) -> bool:
    """Whether ``name``, without dashes, is a flag of ``accelerate launch``."""
    return name in _accelerates()


def config_file(accelerate_config: str) -> Path:
    """The file that ``--accelerate_config`` names.

    Raises:
        UsageError: there is none.
    """
    file = Path(accelerate_config)
    if file.is_file():
        return file
    if accelerate_config not in profiles():
        raise UsageError(f"--accelerate_config {accelerate_config}: no such file, and none of {', '.join(profiles())}.")
    return _PROFILES / f"{accelerate_config}.yaml"


class LaunchFlags:
    """Collects them, and says what ``accelerate launch`` is to be called with.

    ``--num_processes`` and ``--accelerate_config`` are the command's own flags; all others are taken as they are.
    """

    def __init__(self) -> None:
        self._words: list[str] = []
        self._names: list[str] = []

    def add(self, name: str, value: Any) -> None:
        """A key of a run file."""
        if _accelerates()[name].nargs != 0:
            word = str(value).lower() if isinstance(value, bool) else str(value)
            self._add(name, [f"--{name}", word])
        elif value:
            self._add(name, [f"--{name}"])

    def take(self, words: Sequence[str]) -> list[str]:
        """Takes what is accelerate's of a command line, and returns the rest."""
        rest, left = [], list(words)
        while left:
            word = left.pop(0)
            name = word.split("=")[0][2:].replace("-", "_")
            if not (word.startswith("--") and takes(name)):
                rest.append(word)
                continue
            has_value = _accelerates()[name].nargs != 0 and "=" not in word
            self._add(name, [word.replace(word.split("=")[0], f"--{name}", 1), *left[:has_value]])
            del left[:has_value]
        return rest

    def _add(self, name: str, words: list[str]) -> None:
        self._names.append(name)
        self._words += words

    @property
    def names(self) -> list[str]:
        """Of accelerate's own flags that were given."""
        return list(self._names)

    def require(self, asked: argparse.Namespace) -> None:
        """Raises LaunchAskedError where processes are to be started, and this is not one of them.

        Raises:
            UsageError: a launcher that somebody else called has started this process; or ``--accelerate_config`` names
                nothing.
        """
        given = [name for name in ("num_processes", "accelerate_config") if getattr(asked, name) is not None]
        given += self._names
        if not given or is_launched():
            return
        if is_launched_by_others():
            raise UsageError(
                f"{given[0]} is for starting processes, and this is one that accelerate launch or torchrun has "
                "started: leave the launcher out, or the flag (in --config, too)."
            )
        if asked.num_processes is not None and asked.num_processes < 1:
            raise UsageError(f"num_processes is {asked.num_processes}; it should be at least 1")
        raise LaunchAskedError(self._launch_words(asked.num_processes, asked.accelerate_config))

    def _launch_words(self, num_processes: int | None, accelerate_config: str | None) -> list[str]:
        words = []
        if accelerate_config is not None:
            file = config_file(accelerate_config)
            if file.parent == _PROFILES and num_processes is None and accelerate_config != "single_gpu":
                num_processes = max(torch.accelerator.device_count(), 1)  # a profile does not say how many
            words += ["--config_file", str(file)]
        if num_processes is not None:
            words += ["--num_processes", str(num_processes)]
        names_engine = accelerate_config is not None or any(name in _ENGINES for name in self._names)
        if (num_processes or 1) > 1 and not names_engine and not Path(default_config_file).is_file():
            # By itself accelerate starts one process, and says nothing, where it sees fewer than two devices.
            words += ["--multi_gpu"]
        return [*words, *self._words]
