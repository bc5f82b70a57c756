"""The load-balancing loss of every layout is that of the model's own forward of the padded batch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from float64 import KeepFloat64
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_families import make_family
from token_trees import batches
from torch import Tensor
from transformers import PreTrainedModel

from fastdpo.data import PreferenceCollator
from fastdpo.model.attention import RowAttention
from fastdpo.model.head import FusedHead
from fastdpo.model.packing_choice import choose_packing
from fastdpo.model.router_loss import is_loss_of_tokens
from fastdpo.model.row_collator import RowCollator
from fastdpo.model.scoring import Scorer, micro_batches

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
COEF = 0.3
ASKED: dict[str, Any] = {"output_router_logits": True}

make = functools.cache(functools.partial(make_family, length=6, trained=True, dtype=torch.float64))

Found = tuple[Tensor, Tensor, dict[str, Tensor]]


def found_in(loss: Tensor, aux_loss: Tensor, model: PreTrainedModel) -> Found:
    (loss + COEF * aux_loss).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), aux_loss.detach(), gradients


def of_own_forward(model: PreTrainedModel, rows: list[dict[str, Any]]) -> Found:
    """From whole logits of the model's own forward."""
    (batch,) = RowCollator("padded", PreferenceCollator(0))(rows)["micro_batches"]
    model.zero_grad()
    out = model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False, **ASKED)
    logps = out.logits[:, :-1].log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
    return found_in((logps * batch["completion_mask"][:, 1:]).sum(1)[batch["pairs"]].sum(), out.aux_loss, model)


def of_batch(model: PreTrainedModel, batch: dict[str, Any]) -> Found:
    model.zero_grad()
    (part,) = micro_batches(batch)
    head, attention = FusedHead(model), RowAttention(model) if "row" in part else None
    head.inspect(model)
    with attention.active() if attention is not None else contextlib.nullcontext():
        scores = Scorer(model, model, head, attention).score(batch, **ASKED)
        return found_in(scores.sums[scores.pairs].sum(), scores.model_output.aux_loss, model)


def assert_same(got: Found, expected: Found, rtol: float, of_largest: float) -> None:
    assert expected[1] > 0
    torch.testing.assert_close(got[:2], expected[:2], rtol=rtol, atol=0, check_dtype=False)
    assert got[2].keys() == expected[2].keys()
    largest = max(float(gradient.norm()) for gradient in expected[2].values())
    for name, gradient in expected[2].items():
        assert (got[2][name] - gradient).norm() <= rtol * gradient.norm() + of_largest * largest, name


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "jetmoe"])
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=batches(), layout=st.sampled_from(["shared", "shared", "repeated", "padded"]))
def test_random_trees(model_type, rows, layout):
    """In float64, where the model's own function for it has float32."""
    model = make(model_type)
    collate = RowCollator(layout, PreferenceCollator(0), least_shared=1, forward_cost=1)
    with KeepFloat64():
        assert_same(of_batch(model, collate(rows)), of_own_forward(model, rows), 1e-12, 1e-14)


SYSTEM, PROMPT = list(range(7, 19)), [11, 12, 13, 70, 71, 72, 73, 74, 75]
ANSWERS = [[20, 21, 22, 23, 24, 25, 26], [30, 31], [20, 21, 22, 33], [40], [20, 21, 50, 51, 52, 53, 54, 55, 56]]
MANY = [
    {"prompt_ids": SYSTEM + PROMPT, "completion_ids": ANSWERS, "pairs": [[0, 1], [2, 3], [4, 0]]},
    # An answer of the row above: it counts in each.
    {"prompt_ids": SYSTEM + PROMPT, "chosen_ids": ANSWERS[0], "rejected_ids": [60, 63, 64]},
    {"prompt_ids": SYSTEM + [14, 15], "chosen_ids": list(range(40, 60)), "rejected_ids": [60, 63]},
]


def layouts_of(scorer: Scorer) -> list[str]:
    """Those that the model's attention suits."""

    def suits(layout: str) -> bool:
        try:
            choose_packing(layout, [scorer], obstacles={}, max_length=128, device=CPU)
        except NotImplementedError:
            return False
        return True

    return [layout for layout in ("shared", "repeated", "padded") if suits(layout)]


def collators(layouts: list[str]) -> dict[str, Callable[..., dict[str, Any]]]:
    padded = PreferenceCollator(0)
    return {layout: RowCollator(layout, padded, forward_cost=4) for layout in layouts}


QUICK = ["mixtral", "dbrx", "granitemoe", "phimoe", "qwen2_moe"]
# The others of docs/models.md. Those whose layers carry a state are padded here.
OTHERS = """
    deepseek_v4 ernie4_5_moe flex_olmo gpt_oss granitemoe_swa granitemoehybrid granitemoeshared jamba jetmoe laguna
    lara_mini mellum minimax minimax_m2 minimax_m3_vl_text olmoe qwen3_5_moe qwen3_5_moe_text qwen3_moe qwen3_next
    qwen4_exp qwen4_exp_text
"""


@pytest.mark.parametrize(
    "model_type", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS.split())]
)
def test_every_family_that_has_one(model_type):
    """In float32: pairs, a group, a sequence of both, and beginnings that all have in common."""
    model = make_family(model_type, trained=True)
    scorer = Scorer(model, model, FusedHead(model))
    assert is_loss_of_tokens(scorer, CPU)
    expected = of_own_forward(model, MANY)
    layouts = layouts_of(scorer)
    for layout, collate in collators(layouts).items():
        batch = collate(MANY)
        if layout == "shared":
            row = micro_batches(batch)[0]["row"]
            assert len(row.token_index) > 2 * row.input_ids.numel()
        assert_same(of_batch(model, batch), expected, 1e-5, 1e-5)


def test_tokens_that_stand_once_would_not_do(monkeypatch):
    model = make_family("mixtral", trained=True)
    batch = collators(["shared"])["shared"](MANY)
    row = micro_batches(batch)[0]["row"]
    object.__setattr__(row, "token_index", None)
    _, once, _ = of_batch(model, batch)
    assert abs(once - of_own_forward(model, MANY)[1]) > 1e-3 * once


def test_a_model_that_does_not_call_the_function_is_refused(monkeypatch):
    """Where it could not be run before the layout was chosen."""
    model = make_family("mixtral", trained=True)
    forward = type(model).forward

    def own(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **{**kwargs, "output_router_logits": False})
        out.aux_loss = out.logits.sum()
        return out

    monkeypatch.setattr(model, "forward", functools.partial(own, model))
    with pytest.raises(NotImplementedError, match=r"load-balancing loss in a way of its own.*--packing repeated"):
        of_batch(model, collators(["shared"])["shared"](MANY))
    assert of_batch(model, collators(["repeated"])["repeated"](MANY))[1] != 0
