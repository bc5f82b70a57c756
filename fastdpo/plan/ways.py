"""Ways to train that need less memory than the one that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from peft import PeftConfig

from fastdpo.plan.setup import Setup


def ways_of(setup: Setup, make_adapter: Callable[[], PeftConfig | None]) -> Iterator[Setup]:
    """The run as it is asked for, and then others, the nearest first.

    Args:
        setup: the run.
        make_adapter: makes the configuration of the adapter that would be trained, where none is asked for.
    """
    seen: list[Setup] = []
    for way in [setup, *_others(setup, make_adapter)]:
        if way not in seen:
            seen.append(way)
            yield way


def _others(setup: Setup, make_adapter: Callable[[], PeftConfig | None]) -> Iterator[Setup]:
    kept, again = replace(setup, checkpointing=False), replace(setup, checkpointing=True)
    yield from (kept, again)
    if setup.reference == "model":
        again = replace(again, reference="cache")
        yield again
    if setup.peft_config is None:
        yield replace(again, optim="adamw_8bit")
        reference = "adapter" if setup.reference == "model" else setup.reference
        setup = replace(setup, peft_config=make_adapter(), reference=reference)
        yield from (replace(setup, checkpointing=checkpointing) for checkpointing in (False, True))
    if setup.bits is None and setup.dtype == torch.float32 and setup.autocast == torch.bfloat16:
        # Weights that are not trained lose nothing that autocast would not take from them; the adapter stays float32.
        halved = replace(setup, dtype=torch.bfloat16)
        yield from (replace(halved, checkpointing=checkpointing) for checkpointing in (False, True))
    if setup.bits is None:
        yield from (replace(setup, checkpointing=checkpointing, bits=4) for checkpointing in (False, True))
