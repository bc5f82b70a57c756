"""Where memory does not suffice: a second try with half of the workspace, and an error that says what was computed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

from fastdpo.logps.ops import OpInputs

# What there is where torch has no error of its own: the CPU's and Apple's allocators raise RuntimeErrors, and so do our
# CUDA ops, which see torch through its stable ABI (csrc/cuda/inputs.cpp).
_MESSAGES = ("DefaultCPUAllocator", "can't allocate memory", "fastdpo: out of memory", "MPS backend out of memory")

T = TypeVar("T")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not allocate, on a device or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _MESSAGES)


def in_less_memory(compute: Callable[[int], T], budget: int, name: str, inputs: OpInputs) -> T:
    """``compute(budget)``; where memory does not suffice for that, ``compute(budget // 2)``, with a warning.

    Args:
        compute: has no effect before it returns, also not on other processes, which would not know of a second try.
        budget: bytes that may be spent on computing less.
        name: the argument that ``budget`` was, for messages.
        inputs: of the ops, for messages.

    Raises:
        torch.OutOfMemoryError: the second try failed as well; it names the sizes.
    """
    if torch.compiler.is_compiling():
        return compute(budget)
    try:
        return compute(budget)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        failed = str(error)
    # Behind the except block: the error holds on to what the first try had computed.
    smaller = budget // 2
    warnings.warn(
        f"memory did not suffice with {name}={budget}; the call is tried again with {smaller}, which computes more "
        f"and keeps less: give a smaller {name}, or fewer tokens at a time ({failed})",
        stacklevel=3,
    )
    try:
        return compute(smaller)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        vocabulary, hidden_units = inputs.weight.shape
        raise torch.OutOfMemoryError(
            f"{error}\nMemory did not suffice for {len(inputs.targets):,} tokens, hidden states of {hidden_units:,}, a "
            f"vocabulary of {vocabulary:,} ({inputs.hidden.dtype}), with {name}={smaller} bytes either; hidden and "
            "weight as they are, their gradients and what the rest of the program holds must fit beside it"
        ) from error
