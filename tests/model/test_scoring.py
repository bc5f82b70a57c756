from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import make_model
from torch import Tensor
from transformers import PreTrainedModel

from fastdpo.data import PreferenceCollator
from fastdpo.model.attention import RowAttention
from fastdpo.model.head import FusedHead, HeadOutput
from fastdpo.model.row_collator import RowCollator
from fastdpo.model.scoring import (
    Scorer,
    count_tokens,
    count_weight,
    evaluating,
    in_pair_order,
    micro_batches,
    model_inputs,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUTS = ["shared", "repeated", "padded"]
IDS = [([5, 6, 7], [8], [9, 10]), ([11], [12, 13, 14, 15, 16], [17]), ([18], [19], [20]), ([21, 22], [23], [24, 25])]
ROWS = [{"prompt_ids": p, "chosen_ids": c, "rejected_ids": r} for p, c, r in IDS]


def make_batch(layout: str, max_tokens: int | None = None) -> dict[str, Any]:
    return RowCollator(layout, PreferenceCollator(0), max_tokens, least_shared=1)(ROWS)


class OfFloat32:
    """A head whose tokens all have this log-probability."""

    def __init__(self, lm: PreTrainedModel, value: float, tokens: int) -> None:
        self.lm = lm
        self.logps = torch.full((tokens,), value)

    def output(self, shape: tuple[int, ...]) -> HeadOutput:
        logps = self.logps.view(shape)
        return HeadOutput(logps, torch.ones_like(logps, dtype=torch.bool), logps, None, None, None, None)

    def __call__(self, *args: Any, **kwargs: Any) -> HeadOutput:
        return self.output((2, -1))

    def score_row(self, *args: Any, **kwargs: Any) -> HeadOutput:
        return self.output((-1,))

    def inspect_once(self, model: Any) -> None:
        pass


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sequences_are_summed_in_float64(layout):
    """1,000 times -0.1, rounded to float32, is 1,000 times that number, and not what a float32 sum comes to."""
    tokens, value = 1000, -0.1
    row = {"prompt_ids": [1], "chosen_ids": [2] * tokens, "rejected_ids": [3] * tokens}
    (part,) = RowCollator(layout, PreferenceCollator(0))([row])["micro_batches"]
    model = make_model("llama")
    scores = Scorer(model, model, OfFloat32(model, value, 2 * tokens), RowAttention(model)).score(part, ["entropy"])
    exact = tokens * float(torch.tensor(value))
    for sums in (scores.sums.squeeze(1), scores.outputs["entropy"]):
        assert sums.dtype == torch.float64
        torch.testing.assert_close(sums, torch.full((2,), exact, dtype=torch.float64), rtol=1e-13, atol=0)
    in_float32 = torch.full((tokens,), value).cumsum(0)[-1].item()
    assert abs(in_float32 / exact - 1) > 1e-8
    assert scores.tokens.tolist() == [tokens, tokens]


def scores_of(batch: dict[str, Any]) -> dict[str, Tensor]:
    model = make_model("llama", dtype=torch.float64)
    head = FusedHead(model)
    head.inspect(model)
    scores = (
        Scorer(model, model, head, RowAttention(model)).score(batch, ["entropy", "mean_logits", "is_top1"]).in_pairs()
    )
    return {"logps": scores.sums.squeeze(1), "tokens": scores.tokens, **scores.outputs}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_in_parts_is_scored_in_the_order_of_its_pairs(layout):
    whole, parts = make_batch(layout), make_batch(layout, max_tokens=12)
    assert len(micro_batches(whole)) == 1
    assert len(micro_batches(parts)) > 1
    # The longest pair comes first in the parts, and is not the first of the batch where prompts are shared.
    assert micro_batches(parts)[0]["rows"][0] == (0 if layout == "repeated" else 1)
    expected, got = scores_of(whole), scores_of(parts)
    assert expected["tokens"].tolist() == [1, 5, 1, 1, 2, 1, 1, 2]
    for name, values in expected.items():
        torch.testing.assert_close(got[name], values, rtol=1e-5, atol=1e-6, msg=name)  # norms are in float32
    assert torch.equal(in_pair_order([part["pair_rows"] for part in micro_batches(parts)], parts), torch.arange(4))


def test_counts_do_not_depend_on_the_layout():
    sequences = sum(2 * len(p) + len(c) + len(r) for p, c, r in IDS)
    for layout in LAYOUTS:
        for batch in (make_batch(layout), make_batch(layout, max_tokens=12)):
            assert count_weight(batch) == 4
            assert int(count_tokens(batch, padding=False)) == sequences
            assert sum(count_weight(part) for part in micro_batches(batch)) == 4
    assert count_tokens(make_batch("shared"), padding=True) == sequences
    assert count_tokens(make_batch("padded"), padding=True) == 8 * 6
    assert [ids.numel() for ids in model_inputs(make_batch("padded"))] == [8 * 6]
    assert [ids.numel() for ids in model_inputs(make_batch("shared"))] == [sum(map(len, sum(IDS, ())))]


def test_a_batch_of_another_collator_is_its_own_part():
    batch = PreferenceCollator(0)(ROWS)
    assert micro_batches(batch) == [batch]
    assert count_weight(batch) == 4
    torch.testing.assert_close(scores_of(batch)["logps"], scores_of(make_batch("padded"))["logps"], rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_ends(training):
    model = make_model("llama").train(training)
    with pytest.raises(ZeroDivisionError), evaluating(model):
        assert not model.training
        raise ZeroDivisionError
    assert model.training is training
