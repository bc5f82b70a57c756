"""What a compiled graph leaves out."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


def outside_of_graphs(reason: str) -> Callable[[F], F]:
    """A decorator: torch.compile breaks its graph at calls of the function. ``reason`` is for its messages.

    ``torch.compiler.disable`` loads all of the compiler, which takes as long as torch itself; so it is called when the
    compiler is there.
    """

    def decorate(function: F) -> F:
        disabled: list[Callable[..., Any]] = []  # at most one

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                torch._dynamo.graph_break(msg=reason)
            elif "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            if not disabled:
                disabled.append(torch.compiler.disable(function, reason=reason))
            return disabled[0](*args, **kwargs)

        return cast("F", call)

    return decorate
