"""What started the processes of a run, to be typed again: torchrun, accelerate, DeepSpeed's, or fastdpo itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil

# Set in the processes that a command has started in its own place, which then take its flags of the launcher as done.
LAUNCHED = "FASTDPO_LAUNCHED"

_FIRST = 4  # processes between this one and the shell that are looked at
_MODULES = {"torch.distributed.run": ["torchrun"], "accelerate.commands.launch": ["accelerate", "launch"]}
_SCRIPTS = ("torchrun", "accelerate", "accelerate-launch", "deepspeed", "fastdpo")


def launcher_words() -> list[str]:
    """What stands before the name of the command: ``fastdpo``, or what several processes were started with.

    A launcher hands the words after its own to each process, and so has the same at its end.
    """
    if LAUNCHED in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return ["fastdpo"]
    own = [word for word in sys.argv[1:] if not word.startswith(("--local_rank=", "--local-rank="))]  # the launcher's
    found: list[str] = []
    for process in psutil.Process().parents()[:_FIRST]:
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if own and words[len(words) - len(own) :] == own:
            found = words[: len(words) - len(own)]
    if found:
        return _shortened(found)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        ranks = os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])
        return ["torchrun", "--nproc_per_node", ranks, "-m", "fastdpo"]
    return ["fastdpo"]


def _shortened(words: list[str]) -> list[str]:
    """As it was typed, where an interpreter runs the program of that name."""
    if len(words) > 2 and words[1] == "-m" and words[2] in _MODULES:
        return [*_MODULES[words[2]], *words[3:]]
    if len(words) > 1 and Path(words[1]).name in _SCRIPTS:
        return [Path(words[1]).name, *words[2:]]
    return words
