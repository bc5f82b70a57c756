"""What a compiled graph leaves out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

F = TypeVar("F", bound=Callable[..., Any])


def outside_of_graphs(reason: str) -> Callable[[F], F]:
    """A decorator: torch.compile breaks its graph at calls of the function. ``reason`` is for its messages."""
    return cast("Callable[[F], F]", torch.compiler.disable(reason=reason))
