"""Rows cut over 2 and 3 gloo ranks: what one process says of whole ones, for the traffic that is said."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from cut_scores import (
    CHECKPOINTED,
    MIXTURE,
    MODELS,
    OUTPUTS,
    ROWS,
    SHORT,
    TOKENS,
    Case,
    Found,
    assert_as_whole,
    make,
    padded,
)
from ranks import on_ranks
from tiny_models import make_model
from transformers import PreTrainedModel

from fastdpo.model.attention import RowAttention
from fastdpo.model.cut_check import check_cut
from fastdpo.model.cut_heads import HeadCutAttention
from fastdpo.model.cut_rows import CutAttention
from fastdpo.model.head import FusedHead
from fastdpo.model.scoring import Scorer

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [Case(model, batch) for model in (*MODELS, CHECKPOINTED) for batch in ("padded", "short")]


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_cut_rows_are_whole_ones(ranks: int, tmp_path: Path) -> None:
    for of_rank in assert_as_whole(CASES, CutAttention, ranks, tmp_path):
        for case, found in of_rank.items():
            assert_traffic(case, ranks, found)


def test_cut_rows_are_divided_where_the_shorter_completion_ends(tmp_path: Path) -> None:
    assert_as_whole([Case("llama", "padded")], CutAttention, 2, tmp_path, at_shorter=True)


def test_a_load_balancing_loss_is_of_all_tokens(tmp_path: Path) -> None:
    for of_rank in assert_as_whole([Case(MIXTURE, "padded")], CutAttention, 2, tmp_path):
        for found in of_rank.values():
            layers = make(MIXTURE).config.num_hidden_layers
            assert found.forward[0] == {"_allgather_base_": layers + 1, "allreduce_": 1}


def assert_traffic(case: Case, ranks: int, found: Found) -> None:
    """Keys and values once a layer, and again where it is recomputed; their gradients once; and the sums."""
    config = make(case.model).config
    heads, width = (4 if case.model == "gpt2" else 2), 8  # of keys, and of values
    own = -(-(TOKENS if case.batch == "padded" else SHORT) // (2 * ranks)) * 2
    keys_and_values = 2 * ROWS * heads * own * width * 8
    layers = config.num_hidden_layers
    sums = (1 + len(OUTPUTS)) * ROWS * 8
    assert found.forward == (
        {"_allgather_base_": layers, "allreduce_": 1},
        {"_allgather_base_": layers * keys_and_values, "allreduce_": sums},
    )
    calls_back, sent_back = found.backward
    again = {"_allgather_base_": layers} if case.model == CHECKPOINTED else {}
    assert calls_back == {**again, "_reduce_scatter_base_": layers}
    assert sent_back["_reduce_scatter_base_"] == layers * ranks * keys_and_values


def in_chunks() -> PreTrainedModel:
    model = make_model("llama")
    model.config.layer_types = ["chunked_attention", "full_attention"]
    return model


def with_untold_windows() -> PreTrainedModel:
    model = make_model("gemma2", sliding_window=4096)  # which no made-up row comes to
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    return model


CHECKED: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "right": (lambda: make_model("llama"), ""),
    "carries a state": (lambda: make_model("falcon_h1"), "falcon_h1.* layers of the kind hybrid"),
    "has no attention": (lambda: make_model("mamba"), "mamba.* layers of the kind linear_attention"),
    "changes with the length": (in_chunks, "llama.* layers of the kind chunked_attention"),
    "keeps its windows": (with_untold_windows, "gemma2.* sliding window of 4096 tokens, which it does not pass on"),
}


def checked(attention: Callable[[PreTrainedModel], Any]) -> list[str]:
    found = []
    for make_one, _ in CHECKED.values():
        model = make_one()
        scorer = Scorer(model, model, FusedHead(model), attention(model), dist.group.WORLD)
        try:
            check_cut(scorer, torch.device("cpu"), torch.float32)
            found.append("")
        except NotImplementedError as error:
            found.append(str(error))
    return found


def by_heads(model: PreTrainedModel) -> HeadCutAttention:
    return HeadCutAttention(model, RowAttention(model))


@pytest.mark.parametrize("attention", [CutAttention, by_heads])
def test_models_that_do_not_suit_are_refused(attention: Callable[[PreTrainedModel], Any], tmp_path: Path) -> None:
    for rank in on_ranks(partial(checked, attention), 2, tmp_path):
        for said, (name, (_, words)) in zip(rank, CHECKED.items(), strict=True):
            assert re.search(words, said) if words else not said, (name, said)
            assert not said or ("cut over processes" in said and "neither cp_size nor sp_size" in said)


def test_padding_before_the_tokens_is_refused() -> None:
    model, rows = make("llama"), padded()
    # Which is told before any rank is asked.
    scorer = Scorer(model, model, FusedHead(model), CutAttention(model), cast(dist.ProcessGroup, object()))
    for place in (0, 1):
        mask = rows["attention_mask"].clone()
        mask[1, place] = 0
        with pytest.raises(ValueError, match="padding before or among .* pad them on the right"):
            scorer.score(rows | {"attention_mask": mask})
