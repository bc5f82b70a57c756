"""Puts attention over packed rows into a Hugging Face model, through transformers' attention interface.

The models' configurations name our attention while our own calls run; model code is untouched. A row's segments travel
as a keyword argument, so that recomputed activations (gradient checkpointing) find the ones of their forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from fastdpo.model.attention_backends import (
    AttentionOptions,
    RowsNotSupportedError,
    attend_by_segment,
    attend_flex,
    attend_varlen,
    flash_varlen,
    torch_varlen,
)
from fastdpo.model.language_model import language_model

# What computes the attention. "sdpa": a call of scaled_dot_product_attention a segment, on any device. "varlen": one
# call of torch's own variable-length flash attention (CUDA, 16 bits). "flash": one of the flash-attention package or
# kernel that the model was loaded with. "flex": one of FlexAttention with a block mask.
BACKENDS = ("sdpa", "varlen", "flash", "flex")

# The keyword argument by which a row's segments reach the attention.
SEGMENTS = "row_segments"

# What some models pass to their attention that changes its result, and that no back end here computes.
_REFUSED = ("position_bias", "cache", "indices", "block_indices", "head_mask")


class RowAttention:
    """Puts the attention for packed rows into a model, for the time of a ``with`` block.

        attention = RowAttention(model)
        with attention.active():
            model(input_ids=row, position_ids=positions, row_segments=segments)

    Where the model recomputes activations in its backward (gradient checkpointing), the backward belongs into the
    block as well. Outside of it the model is as it was.

    Args:
        model: the model, or the PEFT model around it.
        backend: one of :data:`BACKENDS`.

    Raises:
        ValueError: ``backend`` is not one of them.
        RowsNotSupportedError: the back end is not there.

    Attributes:
        backend: as given.
        attend: what transformers calls, of which a row's segments are a keyword argument.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, backend: str = "sdpa") -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}; it should be one of {', '.join(BACKENDS)}")
        lm = language_model(model)
        self._configs = attention_configs(lm)
        self.backend = backend
        self._name = f"fastdpo_rows_{backend}"
        attend = {"sdpa": attend_by_segment, "flex": attend_flex}.get(backend)
        if attend is None:
            own = lm.config._attn_implementation
            attend = partial(attend_varlen, torch_varlen() if backend == "varlen" else flash_varlen(own))
            if backend == "flash":
                # One name for each kernel. The word "flash" would make models prepare masks of its own kind.
                self._name = f"fastdpo_rows_{own.replace('flash', 'fl')}"
        self.attend = partial(_forward, attend)
        AttentionInterface.register(self._name, self.attend)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """The model attends by segments, and takes nothing but rows, until the block ends."""
        with attending(self._configs, self._name):
            yield

    @contextlib.contextmanager
    def watched(self) -> Iterator[list[int | None]]:
        """As :meth:`active`, with a list that each call of the attention adds its sliding window to."""
        with watching(self._name, self.attend) as windows, self.active():
            yield windows


@contextlib.contextmanager
def watching(name: str, attend: Callable[..., tuple[Tensor, None]]) -> Iterator[list[int | None]]:
    """A list that each call of the attention registered under ``name`` adds its sliding window to, in the block."""
    windows: list[int | None] = []

    def watched(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        windows.append(kwargs.get("sliding_window"))
        return attend(*args, **kwargs)

    AttentionInterface.register(name, watched)
    try:
        yield windows
    finally:
        AttentionInterface.register(name, attend)


@contextlib.contextmanager
def attending(configs: list[PreTrainedConfig], name: str) -> Iterator[None]:
    """The attention of these configurations is the one that was registered under ``name``, until the block ends."""
    before = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = name
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation = own


def attention_configs(model: nn.Module) -> list[PreTrainedConfig]:
    """The configurations in which parts of ``model`` look up what their attention is."""
    # Parents come before their parts: setting a configuration also sets those that it contains.
    configs: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    return list({id(c): c for c in configs if hasattr(c, "_attn_implementation")}.values())


def _forward(
    attend: Callable[..., Tensor],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query [1, Hq, N, D], key and value [1, Hkv, N, D], to [1, N, Hq, D]."""
    segments = kwargs.get(SEGMENTS)
    if segments is None:
        raise RowsNotSupportedError(f"the model does not pass keyword arguments ({SEGMENTS}) on to its attention")
    query, key, options = options_of(module, query, key, value, attention_mask, **kwargs)
    tokens = (1, segments.length)
    if (query.shape[0], query.shape[2]) != tokens or (key.shape[0], key.shape[2]) != tokens:
        raise RowsNotSupportedError(
            f"the model's attention has queries {tuple(query.shape)} and keys {tuple(key.shape)} for a row of "
            f"{segments.length} tokens"
        )
    if options.window is not None and options.window >= segments.max_k:
        options = replace(options, window=None)
    return attend(module, query, key, value, segments, options), None


def options_of(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor, AttentionOptions]:
    """What a layer's call of its attention asks for: the queries and the keys, of the values' dtype, and the options.

    Raises:
        RowsNotSupportedError: it is not to be causal attention, or is more than the options can express.
    """
    if attention_mask is not None:
        raise RowsNotSupportedError("the model makes an attention mask of its own")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise RowsNotSupportedError("the model has attention that is not causal")
    refused = [name for name in _REFUSED if kwargs.get(name) is not None]
    if refused:
        raise RowsNotSupportedError(f"the model's attention takes {', '.join(refused)}")
    if query.dtype != value.dtype:  # a norm of queries and keys in float32, under autocast
        query, key = query.to(value.dtype), key.to(value.dtype)
    options = AttentionOptions(
        dropout=dropout,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap or None,
        sinks=s_aux,
    )
    return query, key, options
