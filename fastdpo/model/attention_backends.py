"""What computes the attention of packed rows.

Each takes the module, query [1, Hq, N, D], key and value [1, Hkv, N, D], the row's segments and the options, and
returns [1, N, Hq, D].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.modeling_flash_attention_utils import lazy_import_flash_attention

from fastdpo.model.segments import Segments


class RowsNotSupportedError(NotImplementedError):
    """A model, or what it asks of its attention, does not suit packed rows; the message says why."""


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """What a layer asks of its attention.

    Attributes:
        dropout: the chance that a probability is dropped.
        scaling: of the scores.
        window: how many keys, itself among them, a query sees of its own segment; None for all.
        softcap: scores are softcap * tanh(score / softcap); None for as they are.
        sinks: [Hq], the score of a key without a value that each head has; None for none.
    """

    dropout: float
    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


class KeyPieces(Protocol):
    """Of :class:`fastdpo.model.segments.Segments`, what one call a segment needs."""

    query_sizes: list[int]
    piece_sizes: list[int]
    key_pieces: list[list[int]]

    def mask(self, queries: int, keys: int, window: int | None, dtype: torch.dtype, device: torch.device) -> Tensor: ...


def attend_by_segment(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: KeyPieces,
    options: AttentionOptions,
) -> Tensor:
    """One call a segment. A prompt with its chosen completion, which follows it, is a plain causal sequence."""
    groups, window = query.shape[1] // key.shape[1], options.window
    # Split, not sliced: in the backward every slice would fill a tensor of the whole row and add it to the others.
    key_pieces, value_pieces = (x.split(segments.piece_sizes, dim=2) for x in (key, value))
    outputs = []
    for q, indices in zip(query.split(segments.query_sizes, dim=2), segments.key_pieces, strict=True):
        k, v = (_join([pieces[i] for i in indices]) for pieces in (key_pieces, value_pieces))
        queries, keys = q.shape[2], k.shape[2]
        plain = window is None or window >= keys
        if options.softcap is not None or options.sinks is not None:
            mask = segments.mask(queries, keys, None if plain else window, _score_dtype(q), q.device)
            out = _attend_in_full(q, k, v, mask, options)
        elif plain and queries == keys:
            out = F.scaled_dot_product_attention(
                q, k, v, dropout_p=options.dropout, scale=options.scaling, is_causal=True, enable_gqa=groups > 1
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
                q,
                k,
                v,
                attn_mask=mask,
                dropout_p=options.dropout,
                scale=options.scaling,
                enable_gqa=groups > 1 and on_cpu,
            )
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, dim=1) if len(outputs) > 1 else outputs[0].contiguous()


def _join(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=2)


def _operand_dtype(query: Tensor) -> torch.dtype:
    """What scaled_dot_product_attention computes in, which is autocast's dtype where that is on."""
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return query.dtype


def _score_dtype(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


def _attend_in_full(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: AttentionOptions) -> Tensor:
    """Softmax of a segment's scores in memory, for what scaled_dot_product_attention cannot express."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = (q @ k.transpose(-1, -2)).to(mask.dtype) * options.scaling
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores + mask
    if options.sinks is not None:
        # A head's sink is a key without a value, that takes its share of the attention.
        sink = options.sinks.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], dim=-1)
    probabilities = scores.softmax(-1)
    if options.sinks is not None:
        probabilities = probabilities[..., :-1]
    return F.dropout(probabilities, options.dropout).to(v.dtype) @ v


def attend_varlen(
    varlen: Callable[..., Tensor],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    options: AttentionOptions,
) -> Tensor:
    """One call for the row: ``varlen`` has the arguments of flash-attention's ``flash_attn_varlen_func``.

    Its causal mask is aligned at the bottom right: a segment's last query attends to the last of its keys.
    """
    if options.dropout or options.sinks is not None:
        what = "dropout" if options.dropout else "attention sinks"
        raise RowsNotSupportedError(f"flash attention on rows has no {what}")
    q, k, v = (x[0].transpose(0, 1).to(_operand_dtype(x)) for x in (query, key, value))
    if segments.key_index is not None:
        k, v = k.index_select(0, segments.key_index), v.index_select(0, segments.key_index)
    asked: dict[str, Any] = {}
    if options.window is not None:
        asked["window_size"] = (options.window - 1, 0)
    if options.softcap is not None:
        asked["softcap"] = options.softcap
    out = varlen(
        q,
        k,
        v,
        cu_seqlens_q=segments.cu_q,
        cu_seqlens_k=segments.cu_k,
        max_seqlen_q=segments.max_q,
        max_seqlen_k=segments.max_k,
        softmax_scale=options.scaling,
        causal=True,
        **asked,
    )
    out = out[0] if isinstance(out, tuple) else out
    return out.unsqueeze(0)


def flash_varlen(implementation: str) -> Callable[..., Tensor]:
    """The variable-length function of the flash attention that transformers loads under this name."""
    try:
        (_, varlen, *_), _ = lazy_import_flash_attention(implementation)
    except (ImportError, ValueError, OSError) as error:
        raise RowsNotSupportedError(f"{implementation} is not there: {error}") from error
    if varlen is None:
        raise RowsNotSupportedError(f"{implementation} has no function for sequences of several lengths")
    return varlen


def torch_varlen() -> Callable[..., Tensor]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise RowsNotSupportedError(f"torch {torch.__version__} has no torch.nn.attention.varlen") from error

    def varlen(q: Tensor, k: Tensor, v: Tensor, *, window_size: tuple[int, int] = (-1, 0), **options: Any) -> Tensor:
        if "softcap" in options:
            raise RowsNotSupportedError("torch's variable-length attention has no softcap")
        out = varlen_attn(
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
        return cast(Tensor, out)  # a pair with what the softmax was divided by, where that is asked for

    return varlen


def attend_flex(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    options: AttentionOptions,
) -> Tensor:
    """FlexAttention, through transformers, which compiles it, with a block mask for the row."""
    out, _ = flex_attention_forward(
        module,
        query,
        key,
        value,
        segments.block_mask(options.window, query.device),
        scaling=options.scaling,
        softcap=options.softcap,
        s_aux=options.sinks,
        dropout=options.dropout,
    )
    return out
