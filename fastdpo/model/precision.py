"""The precision in which a model is looked at: float32 where that can be had, because 16 bits hide small faults."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastdpo.model.attention import attention_configs

T = TypeVar("T")

HALVES = (torch.bfloat16, torch.float16)


@contextlib.contextmanager
def in_float32(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Iterator[torch.dtype]:
    """``model`` computes in float32 until the block ends, where that can be had; gives what it computes in.

    Autocast is off, also where it was put into the model's forward. Weights in 16 bits are widened, beside what they
    were, if there is memory for that; they are as they were, in place and to the bit, when the block ends. What is
    quantised or sharded stays as it is.

    Args:
        model: not wrapped.
        device: where it is.
        dtype: what it computes in by itself, or under autocast.
    """
    tensors = list({id(x): x for x in (*model.parameters(), *model.buffers())}.values())
    narrow = [x for x in tensors if x.dtype in HALVES]
    if any(isinstance(x, DTensor) or not x.numel() for x in tensors) or _is_quantised(model):
        yield dtype
        return
    if narrow and not _has_room(sum(4 * x.numel() for x in narrow), device):
        yield dtype
        return
    with torch.autocast(device.type, enabled=False), _own_forward(model), _no_flash(model), _widened(narrow):
        # The narrowest: models keep a router in float32 whatever the rest is.
        yield max({p.dtype for p in model.parameters()}, key=lambda kind: torch.finfo(kind).eps)


def looked_at(model: nn.Module, device: torch.device, dtype: torch.dtype, look: Callable[[torch.dtype], T]) -> T:
    """What ``look`` finds, which is called with what the model computes in: see :func:`in_float32`.

    Some kernels of linear attention take 16 bits alone. A model that stops in float32 is looked at in ``dtype``, in
    which it is known to run.
    """
    try:
        with in_float32(model, device, dtype) as seen_in:
            return look(seen_in)
    except (torch.OutOfMemoryError, NotImplementedError):
        raise
    except Exception:
        if dtype not in HALVES:
            raise
    return look(dtype)


def _is_quantised(model: nn.Module) -> bool:
    return bool(getattr(model, "is_quantized", False)) or any(not p.is_floating_point() for p in model.parameters())


def _has_room(size: int, device: torch.device) -> bool:
    """Whether there are so many bytes, and as many again for what is computed."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    elif device.type == "cpu":
        free = psutil.virtual_memory().available
    else:
        return False
    return 2 * size <= free


@contextlib.contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """Without the autocast that accelerate puts around a model's forward."""
    wrapped: dict[str, Any] = vars(model)
    if "_original_forward" not in wrapped or "forward" not in wrapped:
        yield
        return
    around = wrapped["forward"]
    model.forward = wrapped["_original_forward"]
    try:
        yield
    finally:
        model.forward = around


@contextlib.contextmanager
def _no_flash(model: nn.Module) -> Iterator[None]:
    """Flash attention takes 16 bits alone: the model's other attention, where it was loaded with that."""
    configs = attention_configs(model)
    before = [config._attn_implementation for config in configs]
    try:
        for config, own in zip(configs, before, strict=True):
            if own is not None and "flash" in own:
                config._attn_implementation = "sdpa"
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation = own


@contextlib.contextmanager
def _widened(tensors: list[Tensor]) -> Iterator[None]:
    before = [x.data for x in tensors]
    try:
        for x in tensors:
            x.data = x.data.float()
        yield
    finally:
        for x, own in zip(tensors, before, strict=True):
            x.data = own
