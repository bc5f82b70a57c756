"""Trees give what their pairs give in padded rows: the loss, every gradient, every metric."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from float64 import KeepFloat64
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tiny_families import make_family
from token_trees import batches, pairs_in
from torch import Tensor
from transformers import PreTrainedModel

from fastdpo.data import PreferenceCollator
from fastdpo.model.attention import RowAttention
from fastdpo.model.head import FusedHead
from fastdpo.model.row_collator import RowCollator
from fastdpo.model.scoring import Scorer, micro_batches

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_oss"]
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
# Some hundred terms in another order.
RTOL = 1e-12

make = functools.cache(functools.partial(make_family, length=6, trained=True, dtype=torch.float64))

Found = tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]


def look(
    model: PreTrainedModel, batch: dict[str, Any], weights: Tensor, *, at_shorter: bool, in_float64: bool = True
) -> Found:
    """The weighted mean of the pairs' losses, what metrics are made of, and the gradients."""
    model.zero_grad()
    head, attention = FusedHead(model), RowAttention(model)
    head.inspect(model)
    is_packed = "row" in micro_batches(batch)[0]
    keeping = KeepFloat64() if in_float64 else contextlib.nullcontext()
    with keeping, attention.active() if is_packed else contextlib.nullcontext():
        scores = Scorer(model, model, head, attention).score(batch, OUTPUTS, at_shorter=at_shorter).in_pairs()
        chosen, rejected = (scores.sums * torch.tensor([1.0, 0.3])[: scores.sums.shape[1]]).sum(1).chunk(2)
        # With a term that does not cancel where both sides are equal.
        losses = F.softplus(0.1 * (rejected - chosen)) - 0.01 * chosen
        loss = (weights * losses).sum() / weights.sum()
        loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), {"sums": scores.sums.detach(), "lengths": scores.lengths, **scores.outputs}, gradients


def assert_same(got: Found, expected: Found) -> None:
    torch.testing.assert_close(got[0], expected[0], rtol=RTOL, atol=0)
    for name, values in expected[1].items():
        # Mean logits and entropies may be sums of terms that cancel.
        atol = 0.0 if name in ("sums", "lengths") else RTOL * float(values.abs().max())
        torch.testing.assert_close(got[1][name], values, rtol=RTOL, atol=atol, msg=name)
    assert got[2].keys() == expected[2].keys()
    # Where all cancels (a key's bias, under softmax; queries, where all tokens are equal) rounding errors are left.
    largest = max(gradient.norm() for gradient in expected[2].values())
    for name, gradient in expected[2].items():
        assert (got[2][name] - gradient).norm() <= RTOL * gradient.norm() + 1e-14 * largest, name


def padded(rows: list[dict[str, Any]], **options: Any) -> tuple[dict[str, Any], Tensor]:
    pairs = [pair for row in rows for pair in pairs_in(row)]
    weights = torch.tensor([pair.get("weight", 1.0) for pair in pairs], dtype=torch.float64)
    return PreferenceCollator(0, **options)(pairs), weights


@pytest.mark.parametrize("model_type", FAMILIES)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(
    rows=batches(),
    layout=st.sampled_from(["shared", "shared", "shared", "repeated", "padded"]),
    limit=st.none() | st.integers(6, 20),
    mode=st.sampled_from(["keep_start", "keep_end"]),
    budget=st.none() | st.integers(20, 60),
    at_shorter=st.booleans(),
)
def test_random_trees(model_type, rows, layout, limit, mode, budget, at_shorter):
    options = {"max_length": limit, "truncation_mode": mode}
    collate = RowCollator(layout, PreferenceCollator(0, **options), budget, least_shared=1)
    try:
        batch = collate(rows)
    except ValueError:  # nothing is left of a completion
        assume(False)
    model = make(model_type)
    of_pairs, weights = padded(rows, **options)
    expected = look(model, of_pairs, weights, at_shorter=at_shorter)
    assert_same(look(model, batch, weights, at_shorter=at_shorter), expected)


SYSTEM, PROMPT, OTHER = [7, 8, 9, 10], [11, 12, 13], [14, 15]
ANSWERS = [[20, 21, 22, 23, 24, 25, 26], [20, 21, 22, 30, 31], [20, 21], [20, 21, 22, 30, 33, 34], [40], [20, 21], [50]]
MANY = [
    {"prompt_ids": SYSTEM + PROMPT, "completion_ids": ANSWERS, "pairs": [[0, 1], [2, 3], [4, 0], [5, 1], [3, 0]]},
    {"prompt_ids": SYSTEM + OTHER, "chosen_ids": [60, 61, 62], "rejected_ids": [60, 63], "chosen_mask": [0, 1, 1]},
    {"prompt_ids": SYSTEM + PROMPT, "chosen_ids": ANSWERS[0], "rejected_ids": [20, 21, 22, 30, 33, 34, 35, 36]},
    # A conversation that goes on: the answer is a part of the next prompt.
    {"prompt_ids": SYSTEM + PROMPT + ANSWERS[4] + OTHER, "chosen_ids": [70, 71], "rejected_ids": [70]},
]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_tree_of_everything(model_type):
    """Branches on branches within completions; equal answers, one that ends another, one in no pair."""
    model = make(model_type)
    of_pairs, weights = padded(MANY)
    expected = look(model, of_pairs, weights, at_shorter=False)
    batch = RowCollator("shared", PreferenceCollator(0), least_shared=1)(MANY)
    row = batch["micro_batches"][0]["row"]
    assert max(len(segment.ancestors) for segment in row.segments.bounds) >= 2
    assert 50 not in row.input_ids
    assert len(row.scored) < row.cu_seqlens[-1]
    assert row.segments.length * 3 < of_pairs["attention_mask"].sum()
    assert_same(look(model, batch, weights, at_shorter=False), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_of_a_tree(reentrant):
    """To the same; what recomputes does not see what keeps norms in float64."""
    _, weights = padded(MANY)
    batch = RowCollator("shared", PreferenceCollator(0), least_shared=1)(MANY)
    model = make_family("qwen3", length=6, trained=True, dtype=torch.float64).train()
    expected = look(model, batch, weights, at_shorter=True, in_float64=False)
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(look(model, batch, weights, at_shorter=True, in_float64=False), expected)
