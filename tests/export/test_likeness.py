"""How far two models are apart, and what rounding keeps of an adapter."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import make_model

from fastdpo.export.likeness import difference, kept, logps_of, made_up_rows, tolerance

GENERATOR = torch.Generator().manual_seed(0)
BASE = torch.randn(400, generator=GENERATOR, dtype=torch.float64)
EFFECT = 0.01 * torch.randn(400, generator=GENERATOR, dtype=torch.float64)
NOISE = 0.05 * torch.randn(400, generator=GENERATOR, dtype=torch.float64)


def test_differences() -> None:
    found = difference(BASE, BASE + 3)
    assert (found.largest, found.rms) == pytest.approx((3, 3))
    assert difference(BASE, torch.full_like(BASE, math.nan)).largest == math.inf
    assert str(difference(BASE, BASE)) == "0 at most, 0 on average (root mean square)"


@pytest.mark.parametrize(
    ("stored", "share", "lost"),
    [
        (BASE + EFFECT, 1.0, False),
        (BASE, 0.0, True),  # rounded back to the base
        (BASE + 0.3 * EFFECT, 0.3, True),
        (BASE + EFFECT + NOISE, 1.0, False),  # five times as much noise, which goes no way
        (BASE - EFFECT, -1.0, True),
    ],
)
def test_what_is_kept(stored: torch.Tensor, share: float, lost: bool) -> None:
    found = kept(BASE, BASE + EFFECT, stored)
    assert found is not None and found.is_lost == lost
    assert abs(found.share - share) <= 3 * found.error + 1e-12
    assert kept(BASE, BASE, stored) is None


def test_rows_hold_what_is_changed() -> None:
    model = make_model("llama", 300)
    rows = made_up_rows(model, [299, 298, 5, 1000, -1])
    assert rows == made_up_rows(model, [5, 299, 298]) and {299, 298, 5} <= {token for row in rows for token in row}
    assert max(map(max, rows)) < 300 and len(rows) == 4
    assert [len(row) for row in made_up_rows(make_model("llama", 300, max_position_embeddings=9))] == [9] * 4


def test_log_probabilities_are_those_of_the_tokens() -> None:
    model, row = make_model("qwen2"), [5, 9, 3, 200]
    found, largest = logps_of(model, [row, row[:2]])
    with torch.no_grad():
        logits = model(torch.tensor([row])).logits[0]
    expected = [logits[i].log_softmax(-1)[token].item() for i, token in enumerate(row[1:])]
    assert found.tolist() == pytest.approx([*expected, expected[0]], abs=1e-5)
    assert largest == pytest.approx(logits[:-1].abs().max().item(), abs=1e-5)
    assert 0 < tolerance(model, 1.0) == tolerance(model, 4.0) < tolerance(model, 30.0)
