"""What every entry point asks of its tensors before anything else: that they are tensors, and dense ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def refuse_not_dense(**arguments: Tensor | None) -> None:
    """TypeError unless each is None or a dense tensor; the message names it, and says what to give in its place."""
    for name, value in arguments.items():
        if value is not None and (wrong := _not_dense(name, value)):
            raise TypeError(f"{name} is {wrong}")


def _not_dense(name: str, value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}; it should be a torch.Tensor"
    if value.is_nested:
        return (
            "a nested tensor; it should be a plain one: its sequences one after another, "
            f"torch.cat({name}.unbind()), with their bounds in dpo_loss's cu_seqlens"
        )
    if value.layout != torch.strided:
        return f"a tensor of layout {value.layout}; it should be dense: {name}.to_dense()"
    if value.is_quantized:
        return f"quantized, {value.dtype}; it should hold plain numbers: {name}.dequantize()"
    return ""
