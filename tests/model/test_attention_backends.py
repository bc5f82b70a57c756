from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from segment_masks import dense
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_mask

from fastdpo.model import attention_backends
from fastdpo.model.attention_backends import (
    AttentionOptions,
    RowsNotSupportedError,
    attend_by_segment,
    attend_flex,
    attend_varlen,
    flash_varlen,
    torch_varlen,
)
from fastdpo.model.segments import Segment, Segments

pytestmark = pytest.mark.usefixtures("one_thread")

# An odd pair; a prompt of one token; completions of one token; a plain sequence; a tree, whose branches hang on
# branches, several on one token, and on another higher up.
ROW = Segments(
    [
        Segment(0, 11),
        Segment(11, 17, ((0, 5),)),
        Segment(17, 20),
        Segment(20, 27, ((17, 18),)),
        Segment(27, 32),
        Segment(32, 33, ((27, 31),)),
        Segment(33, 40),
        Segment(40, 52),
        Segment(52, 54, ((40, 49),)),
        Segment(54, 61, ((40, 47),)),
        Segment(61, 64, ((40, 47), (54, 58))),
        Segment(64, 65, ((40, 47), (54, 58), (61, 63))),
        Segment(65, 69, ((40, 47), (54, 58))),
        Segment(69, 74, ((40, 47),)),
        Segment(74, 75, ((40, 41),)),
    ]
)
PLAIN = AttentionOptions(dropout=0.0, scaling=0.4)
# A few dozen terms in another order.
TOLERANCE = 1e-13


def make_inputs(*, heads: int = 4, kv_heads: int = 2, size: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Laid out as models do: [1, N, heads, size], transposed."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(1, ROW.length, h, size, generator=generator, dtype=torch.float64).transpose(1, 2).requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    )


def attend_densely(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
    """The definition, over the whole row with one mask."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(-1, -2) * options.scaling
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    scores = scores.masked_fill(~dense(ROW, options.window), -torch.inf)
    weights = scores.exp()
    total = weights.sum(-1, keepdim=True)
    if options.sinks is not None:
        total = total + options.sinks.exp()[:, None, None]
    return (weights / total @ value).transpose(1, 2)


def varlen_in_torch(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """What flash_attn_varlen_func promises: sequences one after another, causal masks aligned at the bottom right."""
    assert options["causal"]
    cu_q, cu_k = options["cu_seqlens_q"].tolist(), options["cu_seqlens_k"].tolist()
    assert options["max_seqlen_q"] == max(b - a for a, b in zip(cu_q, cu_q[1:], strict=False))
    assert options["max_seqlen_k"] == max(b - a for a, b in zip(cu_k, cu_k[1:], strict=False))
    left, right = options.get("window_size", (-1, 0))
    assert right == 0
    groups = q.shape[1] // k.shape[1]
    outputs = []
    for i in range(len(cu_q) - 1):
        qi = q[cu_q[i] : cu_q[i + 1]].transpose(0, 1)
        ki, vi = (x[cu_k[i] : cu_k[i + 1]].repeat_interleave(groups, 1).transpose(0, 1) for x in (k, v))
        scores = qi @ ki.transpose(-1, -2) * options["softmax_scale"]
        if "softcap" in options:
            scores = options["softcap"] * torch.tanh(scores / options["softcap"])
        n, m = scores.shape[-2:]
        distance = torch.arange(n)[:, None] + m - n - torch.arange(m)
        hidden = (distance < 0) | ((distance > left) if left >= 0 else False)
        outputs.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ vi).transpose(0, 1))
    return torch.cat(outputs)


def assert_agrees(attend: Any, *, heads: int = 4, kv_heads: int = 2, **changes: Any) -> None:
    """Result and gradients are those of the definition."""
    options = replace(PLAIN, **changes)
    inputs = make_inputs(heads=heads, kv_heads=kv_heads)
    sinks = [] if options.sinks is None else [options.sinks]
    results = []
    for out in (attend(nn.Module(), *inputs, ROW, options), attend_densely(*inputs, options)):
        assert out.shape == (1, ROW.length, inputs[0].shape[1], 8)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        results.append([out, *torch.autograd.grad((out * weights).sum(), [*inputs, *sinks])])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE)


SINKS = torch.tensor([-1.0, 0.0, 0.5, 2.0], dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_heads": 4},
        {"heads": 3, "kv_heads": 1},
        {"window": 3},
        {"window": 1},
        {"softcap": 0.7},
        {"softcap": 0.7, "window": 4},
        {"sinks": SINKS},
        {"sinks": SINKS, "softcap": 0.7, "window": 6},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_segments_give_the_attention_of_one_dense_mask(options):
    assert_agrees(attend_by_segment, **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"kv_heads": 4}, {"window": 3}, {"softcap": 0.7}, {"softcap": 0.7, "window": 4}],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_one_variable_length_call_gives_the_same(options):
    assert_agrees(partial(attend_varlen, varlen_in_torch), **options)


def test_a_row_without_prefixes_is_not_gathered():
    row = Segments([Segment(0, 30), Segment(30, ROW.length)])
    inputs = make_inputs()
    out = attend_varlen(varlen_in_torch, nn.Module(), *inputs, row, PLAIN)
    torch.testing.assert_close(out, attend_by_segment(nn.Module(), *inputs, row, PLAIN), rtol=TOLERANCE, atol=TOLERANCE)


def test_torchs_own_function_is_called_with_its_own_names(monkeypatch):
    """It has no kernel for CPUs: a stand-in with its signature takes its place."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert enable_gqa == (query.shape[1] != key.shape[1])
        return varlen_in_torch(
            query,
            key,
            value,
            cu_seqlens_q=cu_seq_q,
            cu_seqlens_k=cu_seq_k,
            max_seqlen_q=max_q,
            max_seqlen_k=max_k,
            softmax_scale=scale,
            window_size=window_size,
            causal=True,
        )

    monkeypatch.setattr(varlen, "varlen_attn", stand_in)
    assert_agrees(partial(attend_varlen, torch_varlen()))
    assert_agrees(partial(attend_varlen, torch_varlen()), window=3, kv_heads=4)
    with pytest.raises(RowsNotSupportedError, match="has no softcap"):
        attend_varlen(torch_varlen(), nn.Module(), *make_inputs(), ROW, replace(PLAIN, softcap=1.0))


def test_variable_length_calls_refuse_what_they_cannot_do():
    inputs = make_inputs()
    with pytest.raises(RowsNotSupportedError, match="has no dropout"):
        attend_varlen(varlen_in_torch, nn.Module(), *inputs, ROW, replace(PLAIN, dropout=0.1))
    with pytest.raises(RowsNotSupportedError, match="has no attention sinks"):
        attend_varlen(varlen_in_torch, nn.Module(), *inputs, ROW, replace(PLAIN, sinks=SINKS))
    with pytest.raises(RowsNotSupportedError, match="flash_attention_2 is not there"):
        flash_varlen("flash_attention_2")


@pytest.mark.parametrize("window", [None, 3])
def test_flex_attention_gets_the_mask_of_the_row(monkeypatch, window):
    """Its kernels have no gradient on CPUs: what it is called with is looked at."""
    calls = []
    monkeypatch.setattr(
        attention_backends, "flex_attention_forward", lambda *args, **kwargs: (calls.append((args, kwargs)), None)
    )
    inputs = make_inputs()
    attend_flex(nn.Module(), *inputs, ROW, replace(PLAIN, window=window, softcap=0.7))
    ((_, query, _, _, block_mask), options) = calls[0]
    assert query is inputs[0]
    assert options == {"scaling": 0.4, "softcap": 0.7, "s_aux": None, "dropout": 0.0}
    found = create_mask(block_mask.mask_mod, None, None, ROW.length, ROW.length, device="cpu")
    assert torch.equal(found[0, 0], dense(ROW, window))
    assert block_mask.shape[-2:] == (ROW.length, ROW.length)


def test_dropout_acts_on_the_attention():
    inputs = make_inputs()
    torch.manual_seed(0)
    exact = attend_by_segment(nn.Module(), *inputs, ROW, PLAIN)
    for options in ({}, {"softcap": 100.0}):
        noisy = attend_by_segment(nn.Module(), *inputs, ROW, replace(PLAIN, **options, dropout=0.5))
        assert (noisy - exact).abs().max() > 0.1


def test_the_path_of_other_devices_has_the_same_shapes():
    inputs = [x.detach().to("meta") for x in make_inputs()]
    out = attend_by_segment(nn.Module(), *inputs, ROW.to("meta"), PLAIN)
    assert out.shape == (1, ROW.length, 4, 8)


def test_under_autocast_it_is_16_bits():
    inputs = [x.detach().float() for x in make_inputs()]
    exact = attend_by_segment(nn.Module(), *inputs, ROW, PLAIN)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend_by_segment(nn.Module(), *inputs, ROW, PLAIN)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0, atol=8 * torch.finfo(torch.bfloat16).eps)
