"""Attention over packed rows: several sequences in one row, some of which begin with the same prompt.

A row's queries are cut into segments. A segment's queries attend to their own segment causally, and before that to all
of a prefix: the prompt that another segment of the row begins with. So ``[prompt | chosen | rejected]`` is two
segments, ``[prompt | chosen]`` and ``[rejected]`` with the prompt as its prefix, and a plain sequence is one without.

The attention is registered with transformers' attention interface, and the models' configurations name it while our
own calls run; model code is untouched. The segments travel as a keyword argument, so that recomputed activations
(gradient checkpointing) find the ones of their forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

# What computes the attention. "sdpa": a call of scaled_dot_product_attention a segment, on any device. "varlen": one
# call of torch's own variable-length flash attention (CUDA, 16 bits). "flash": one of the flash-attention package or
# kernel that the model was loaded with. "flex": one of FlexAttention with a block mask.
BACKENDS = ("sdpa", "varlen", "flash", "flex")

# The keyword argument by which a row's segments reach the attention.
SEGMENTS = "row_segments"

# What some models pass to their attention that changes its result, and that no back end here computes.
_REFUSED = ("position_bias", "cache", "indices", "block_indices", "head_mask")


class RowsNotSupportedError(NotImplementedError):
    """A model, or what it asks of its attention, does not suit packed rows; the message says why."""


class Segment(NamedTuple):
    """Queries [begin, end) of a row; their keys are [prefix_begin, prefix_end) and then their own, causally."""

    begin: int
    end: int
    prefix_begin: int
    prefix_end: int


class Segments:
    """What each token of a row attends to.

    Args:
        segments: none empty, one after another from 0 to the row's end.

    Attributes:
        bounds: the segments, on the host.
        length: N, the row's tokens.
        cu_q, cu_k: [S + 1] int32, bounds of the segments' queries, and of their keys in ``key_index``.
        key_index: [K] int64, the keys of all segments one after another, as positions in the row; None where these are
            the row itself.
        max_q, max_k: the most queries, and the most keys, of a segment.

    Raises:
        ValueError: the segments leave a gap, or a prefix does not come before its segment.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.bounds = tuple(segments)
        ends = [0, *(s.end for s in self.bounds)]
        for s, previous_end in zip(self.bounds, ends, strict=False):
            if s.begin != previous_end or s.end <= s.begin or not s.prefix_begin <= s.prefix_end <= s.begin:
                raise ValueError(f"{s} should begin at {previous_end}, hold a token, and have its prefix before it")
        self.length = ends[-1]
        prefixes = [s.prefix_end - s.prefix_begin for s in self.bounds]
        keys = [s.end - s.begin + prefix for s, prefix in zip(self.bounds, prefixes, strict=True)]
        self.max_q = max(s.end - s.begin for s in self.bounds)
        self.max_k = max(keys)
        self.cu_q = torch.tensor(ends, dtype=torch.int32)
        self.cu_k = torch.tensor([0, *accumulate(keys)], dtype=torch.int32)
        self.key_index = None
        if any(prefixes):
            ranges = [r for s in self.bounds for r in ((s.prefix_begin, s.prefix_end), (s.begin, s.end))]
            self.key_index = torch.cat([torch.arange(*r) for r in ranges])
        self._masks: dict[Any, Any] = {}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Segments:
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Segments:
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Segments:
        other = object.__new__(Segments)
        other.__dict__.update(self.__dict__, _masks={})
        other.cu_q, other.cu_k = change(self.cu_q), change(self.cu_k)
        other.key_index = None if self.key_index is None else change(self.key_index)
        return other

    def mask(self, queries: int, keys: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        """[queries, keys], 0 where a segment's query attends and -inf elsewhere; made once for all layers."""
        name = (queries, keys, window, dtype)
        if name not in self._masks:
            # How many keys lie between; below 0 is the future.
            distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
            hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
            self._masks[name] = torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
        return self._masks[name]

    def block_mask(self, window: int | None, device: torch.device) -> BlockMask:
        """The same for the whole row, for FlexAttention."""
        if window not in self._masks:
            mod = self.mask_mod(window, device)
            self._masks[window] = create_block_mask(mod, None, None, self.length, self.length, device=str(device))
        return self._masks[window]

    def mask_mod(self, window: int | None, device: torch.device) -> Callable[..., Tensor]:
        """FlexAttention's ``mask_mod(b, h, q, kv)``: whether token ``q`` of the row attends to token ``kv``."""
        counts = torch.tensor([s.end - s.begin for s in self.bounds], device=device)
        begin, prefix_begin, prefix_end = (
            torch.tensor([getattr(s, name) for s in self.bounds], device=device).repeat_interleave(counts)
            for name in ("begin", "prefix_begin", "prefix_end")
        )

        def attends(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
            own = (kv >= begin[q]) & (kv <= q)
            prefix = (kv >= prefix_begin[q]) & (kv < prefix_end[q])
            if window is None:
                return own | prefix
            # What lies between a prefix and its segment belongs to others, and is no distance.
            return (own & (q - kv < window)) | (prefix & (q - begin[q] + prefix_end[q] - kv < window))

        return attends


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
    """

    def __init__(self, model: PreTrainedModel | PeftModel, backend: str = "sdpa") -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend is {backend!r}; it should be one of {', '.join(BACKENDS)}")
        lm = model.get_base_model() if isinstance(model, PeftModel) else model
        # Parents come before their parts: setting a configuration also sets those that it contains.
        configs = (module.config for module in lm.modules() if hasattr(module, "config"))
        self._configs = list({id(c): c for c in configs if hasattr(c, "_attn_implementation")}.values())
        self.backend = backend
        self._name = f"fastdpo_rows_{backend}"
        attend = {"sdpa": attend_by_segment, "flex": _attend_flex}.get(backend)
        if attend is None:
            own = lm.config._attn_implementation
            attend = partial(attend_varlen, _torch_varlen() if backend == "varlen" else _flash_varlen(own))
            if backend == "flash":
                # One name for each kernel. The word "flash" would make models prepare masks of its own kind.
                self._name = f"fastdpo_rows_{own.replace('flash', 'fl')}"
        self._attend = partial(_forward, attend)
        AttentionInterface.register(self._name, self._attend)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """The model attends by segments, and takes nothing but rows, until the block ends."""
        before = [config._attn_implementation for config in self._configs]
        try:
            for config in self._configs:
                config._attn_implementation = self._name
            yield
        finally:
            for config, own in zip(self._configs, before, strict=True):
                config._attn_implementation = own

    @contextlib.contextmanager
    def watched(self) -> Iterator[list[int | None]]:
        """As :meth:`active`, with a list that each call of the attention adds its sliding window to."""
        windows: list[int | None] = []

        def attend(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
            windows.append(kwargs.get("sliding_window"))
            return self._attend(*args, **kwargs)

        AttentionInterface.register(self._name, attend)
        try:
            with self.active():
                yield windows
        finally:
            AttentionInterface.register(self._name, self._attend)


def _forward(
    attend: Callable[..., Tensor],
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
) -> tuple[Tensor, None]:
    """What transformers calls: query [1, Hq, N, D], key and value [1, Hkv, N, D], to [1, N, Hq, D]."""
    segments = kwargs.get(SEGMENTS)
    if segments is None:
        raise RowsNotSupportedError(f"the model does not pass keyword arguments ({SEGMENTS}) on to its attention")
    if attention_mask is not None:
        raise RowsNotSupportedError("the model makes an attention mask of its own")
    if is_causal is False or not getattr(module, "is_causal", True):
        raise RowsNotSupportedError("the model has attention that is not causal")
    refused = [name for name in _REFUSED if kwargs.get(name) is not None]
    if refused:
        raise RowsNotSupportedError(f"the model's attention takes {', '.join(refused)}")
    tokens = (1, segments.length)
    if (query.shape[0], query.shape[2]) != tokens or (key.shape[0], key.shape[2]) != tokens:
        raise RowsNotSupportedError(
            f"the model's attention has queries {tuple(query.shape)} and keys {tuple(key.shape)} for a row of "
            f"{segments.length} tokens"
        )
    if sliding_window is not None and sliding_window >= segments.max_k:
        sliding_window = None
    if query.dtype != value.dtype:  # a norm of queries and keys in float32, under autocast
        query, key = query.to(value.dtype), key.to(value.dtype)
    out = attend(
        module,
        query,
        key,
        value,
        segments,
        dropout=dropout,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap or None,
        sinks=s_aux,
    )
    return out, None


# --------------------------------------------------------------------------------------------------------------------
# Back ends: module, query, key, value, segments, and the options by name -> [1, N, Hq, D]
# --------------------------------------------------------------------------------------------------------------------


def attend_by_segment(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    dropout: float,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One call a segment. A prompt with its chosen completion, which follows it, is a plain causal sequence."""
    groups = query.shape[1] // key.shape[1]
    outputs = []
    for begin, end, prefix_begin, prefix_end in segments.bounds:
        q = query[:, :, begin:end]
        k, v = (_with_prefix(x, begin, end, prefix_begin, prefix_end) for x in (key, value))
        queries, keys = q.shape[2], k.shape[2]
        plain = window is None or window >= keys
        if softcap is not None or sinks is not None:
            mask = segments.mask(queries, keys, None if plain else window, _score_dtype(q), q.device)
            out = _attend_in_full(q, k, v, mask, dropout, scaling, softcap, sinks)
        elif plain and queries == keys:
            out = F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=groups > 1
            )
        else:
            on_cpu = q.device.type == "cpu"
            if groups > 1 and not on_cpu:
                # With a mask, CUDA's fused kernels take as many key heads as query heads.
                k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
            if plain and not on_cpu:
                mask = causal_lower_right(queries, keys)
            else:
                # Of floats: booleans would be turned into floats in every layer.
                mask = segments.mask(queries, keys, None if plain else window, _operand_dtype(q), q.device)
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=groups > 1 and on_cpu
            )
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0].contiguous()


def _with_prefix(x: Tensor, begin: int, end: int, prefix_begin: int, prefix_end: int) -> Tensor:
    own = x[:, :, begin:end]
    return own if prefix_begin == prefix_end else torch.cat([x[:, :, prefix_begin:prefix_end], own], dim=2)


def _operand_dtype(query: Tensor) -> torch.dtype:
    """What scaled_dot_product_attention computes in, which is autocast's dtype where that is on."""
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return query.dtype


def _score_dtype(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


def _attend_in_full(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    dropout: float,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Softmax of a segment's scores in memory, for what scaled_dot_product_attention cannot express."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.transpose(-1, -2)).to(mask.dtype) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores + mask
    if sinks is not None:
        # A head's sink is a key without a value, that takes its share of the attention.
        sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    probabilities = scores.softmax(-1)
    if sinks is not None:
        probabilities = probabilities[..., :-1]
    return F.dropout(probabilities, dropout).to(v.dtype) @ v


def attend_varlen(
    varlen: Callable[..., Tensor],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    dropout: float,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """One call for the row: ``varlen`` has the arguments of flash-attention's ``flash_attn_varlen_func``.

    Its causal mask is aligned at the bottom right: a segment's last query attends to the last of its keys.
    """
    if dropout or sinks is not None:
        raise RowsNotSupportedError("flash attention on rows has no " + ("dropout" if dropout else "attention sinks"))
    q, k, v = (x[0].transpose(0, 1).to(_operand_dtype(x)) for x in (query, key, value))
    if segments.key_index is not None:
        k, v = k.index_select(0, segments.key_index), v.index_select(0, segments.key_index)
    options: dict[str, Any] = {}
    if window is not None:
        options["window_size"] = (window - 1, 0)
    if softcap is not None:
        options["softcap"] = softcap
    out = varlen(
        q,
        k,
        v,
        cu_seqlens_q=segments.cu_q,
        cu_seqlens_k=segments.cu_k,
        max_seqlen_q=segments.max_q,
        max_seqlen_k=segments.max_k,
        softmax_scale=scaling,
        causal=True,
        **options,
    )
    out = out[0] if isinstance(out, tuple) else out
    return out.unsqueeze(0)


def _flash_varlen(implementation: str) -> Callable[..., Tensor]:
    """The variable-length function of the flash attention that transformers loads under this name."""
    try:
        (_, varlen, *_), _ = lazy_import_flash_attention(implementation)
    except (ImportError, ValueError, OSError) as error:
        raise RowsNotSupportedError(f"{implementation} is not there: {error}") from error
    if varlen is None:
        raise RowsNotSupportedError(f"{implementation} has no function for sequences of several lengths")
    return varlen


def _torch_varlen() -> Callable[..., Tensor]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise RowsNotSupportedError(f"torch {torch.__version__} has no torch.nn.attention.varlen") from error

    def varlen(q: Tensor, k: Tensor, v: Tensor, *, window_size: tuple[int, int] = (-1, 0), **options: Any) -> Tensor:
        if "softcap" in options:
            raise RowsNotSupportedError("torch's variable-length attention has no softcap")
        return varlen_attn(
            q,
            k,
            v,
            options["cu_seqlens_q"],
            options["cu_seqlens_k"],
            options["max_seqlen_q"],
            options["max_seqlen_k"],
            scale=options["softmax_scale"],
            window_size=window_size,
            enable_gqa=q.shape[1] != k.shape[1],
        )

    return varlen


def _attend_flex(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    dropout: float,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """FlexAttention, through transformers, which compiles it, with a block mask for the row."""
    out, _ = flex_attention_forward(
        module,
        query,
        key,
        value,
        segments.block_mask(window, query.device),
        scaling=scaling,
        softcap=softcap,
        s_aux=sinks,
        dropout=dropout,
    )
    return out
