"""Padded rows in several forwards: little padding, and the same steps."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from float64 import KeepFloat64
from hypothesis import given
from hypothesis import strategies as st
from tiny_families import make_family

from fastdpo.data.collator import PreferenceCollator
from fastdpo.model.head import FusedHead
from fastdpo.model.padded_parts import split_by_length
from fastdpo.model.row_collator import RowCollator
from fastdpo.model.scoring import Scorer, count_tokens, model_inputs

pytestmark = pytest.mark.usefixtures("one_thread")

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def time_of(parts: list[list[int]], lengths: list[int], cost: int) -> int:
    return sum(cost + len(part) * max(lengths[i] for i in part) for part in parts)


def partitions(items: list[int]):
    if not items:
        yield []
        return
    first, *others = items
    for size in range(len(others) + 1):
        for chosen in itertools.combinations(others, size):
            rest = [i for i in others if i not in chosen]
            for parts in partitions(rest):
                yield [[first, *chosen], *parts]


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(0, 80))
def test_no_division_takes_less_time(lengths, cost):
    parts = split_by_length(lengths, cost)
    assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
    assert all(lengths[part[0]] == max(lengths[i] for i in part) for part in parts)
    best = min(time_of(parts, lengths, cost) for parts in partitions(list(range(len(lengths)))))
    assert time_of(parts, lengths, cost) == best


@pytest.mark.parametrize("cost", [64, 256])
def test_texts_of_all_lengths_have_little_padding(cost):
    rng = random.Random(0)
    lengths = [min(1024, int(rng.lognormvariate(5.8, 0.7)) + 8) for _ in range(16 * 100)]
    computed = 0
    for i in range(0, len(lengths), 16):
        batch = lengths[i : i + 16]
        computed += time_of(split_by_length(batch, cost), batch, 0)
    assert computed <= 1.25 * sum(lengths)


def made_up(counts: list[tuple[int, int, int]]) -> list[dict[str, list[int]]]:
    rng = random.Random(0)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {name: [rng.randrange(3, 90) for _ in range(n)] for name, n in zip(names, row, strict=True)} for row in counts
    ]


@pytest.mark.parametrize("at_shorter", [False, True], ids=["", "in two segments"])
@pytest.mark.parametrize("model_type", ["mamba", "bloom", "bamba"])
def test_scores_and_gradients_are_those_of_one_forward(model_type, at_shorter):
    rows = made_up([(9, 60, 4), (1, 3, 30), (20, 2, 2), (4, 70, 71)])
    collate = PreferenceCollator(pad_token_id=0, pad_to_multiple_of=4)
    (whole,) = RowCollator("padded", collate)(rows)["micro_batches"]
    (divided,) = RowCollator("padded", collate, forward_cost=8)(rows)["micro_batches"]
    assert "forwards" not in whole
    assert len(divided["forwards"]) > 2
    assert all(width % 4 == 0 for _, width in divided["forwards"])
    assert count_tokens(divided, padding=False) == count_tokens(whole, padding=False)
    assert (
        count_tokens(divided, padding=True)
        == sum(ids.numel() for ids in model_inputs(divided))
        < whole["input_ids"].numel()
    )
    found = []
    for batch in (whole, divided):
        model = make_family(model_type, trained=True, dtype=torch.float64)
        scorer = Scorer(model, model, FusedHead(model))
        with KeepFloat64():
            scores = scorer.score(batch, OUTPUTS, at_shorter=at_shorter)
        (scores.sums * torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]).sum().backward()
        found.append((scores, {name: p.grad for name, p in model.named_parameters()}))
    (one, true), (several, gradients) = found
    torch.testing.assert_close(several.sums, one.sums)
    assert torch.equal(several.lengths, one.lengths)
    torch.testing.assert_close(several.outputs, one.outputs)
    torch.testing.assert_close(gradients, true, rtol=1e-6, atol=1e-9)
