"""Several forwards of padded rows are one, with a load-balancing loss, too."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_families import make_family

from fastdpo.data.collator import PreferenceCollator
from fastdpo.model.head import FusedHead
from fastdpo.model.router_loss import is_loss_of_tokens
from fastdpo.model.row_collator import RowCollator
from fastdpo.model.scoring import Scorer

pytestmark = pytest.mark.usefixtures("one_thread")


def made_up(counts: list[tuple[int, int, int]]) -> list[dict[str, list[int]]]:
    rng = random.Random(0)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {name: [rng.randrange(3, 90) for _ in range(n)] for name, n in zip(names, row, strict=True)} for row in counts
    ]


# Padded families that give such a loss; deepseek_v4's has routers of its own.
@pytest.mark.parametrize("model_type", ["qwen3_next", "jamba", "granitemoehybrid", "deepseek_v4"])
def test_the_load_balancing_loss_is_that_of_one_forward(model_type):
    rows = made_up([(9, 30, 4), (1, 3, 20), (20, 2, 2), (4, 50, 51)])
    collate = PreferenceCollator(pad_token_id=0)
    (whole,) = RowCollator("padded", collate)(rows)["micro_batches"]
    (divided,) = RowCollator("padded", collate, forward_cost=8)(rows)["micro_batches"]
    assert len(divided["forwards"]) > 2
    found = []
    for batch in (whole, divided):
        model = make_family(model_type, trained=True)
        scorer = Scorer(model, model, FusedHead(model))
        assert is_loss_of_tokens(scorer, torch.device("cpu"))
        scores = scorer.score(batch, output_router_logits=True)
        loss = scores.model_output.aux_loss
        loss.backward()
        found.append((loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    (one, true), (several, gradients) = found
    assert one > 0
    torch.testing.assert_close(several, one, rtol=1e-5, atol=0)
    assert gradients.keys() == true.keys() != set()
    largest = max(float(g.abs().max()) for g in true.values())
    torch.testing.assert_close(gradients, true, rtol=1e-3, atol=1e-4 * largest)
    # Not the mean of the forwards' losses, of which each is of its own tokens.
    assert Scorer(model, model, FusedHead(model)).score(divided).model_output is None
