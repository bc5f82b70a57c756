"""Rows whose attention is cut by heads over 2 and 4 gloo ranks: what one process says, for the traffic that is said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cut_scores import BATCHES, CHECKPOINTED, MIXTURE, MODELS, OUTPUTS, Case, Found, assert_as_whole, make
from transformers import PreTrainedModel

from fastdpo.model.attention import RowAttention
from fastdpo.model.cut_heads import HeadCut, HeadCutAttention

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [Case(model, batch) for model in (*MODELS, CHECKPOINTED) for batch in BATCHES]


def attention(model: PreTrainedModel) -> HeadCutAttention:
    return HeadCutAttention(model, RowAttention(model))


# Of four, two share a head of keys and values.
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_cut_rows_are_whole_ones(ranks: int, tmp_path: Path) -> None:
    for of_rank in assert_as_whole(CASES, attention, ranks, tmp_path):
        for case, found in of_rank.items():
            assert_traffic(case, ranks, found)


def test_cut_rows_are_divided_where_the_shorter_completion_ends(tmp_path: Path) -> None:
    cases = [Case("llama", batch) for batch in ("padded", "shared")]
    assert_as_whole(cases, attention, 2, tmp_path, at_shorter=True)


def test_a_load_balancing_loss_is_of_all_tokens(tmp_path: Path) -> None:
    cases = [Case(MIXTURE, batch) for batch in ("padded", "shared", "repeated")]
    for of_rank in assert_as_whole(cases, attention, 2, tmp_path):
        for found in of_rank.values():
            assert found.forward[0]["_allgather_base_"] == 1  # of what routers said, in all layers


def assert_traffic(case: Case, ranks: int, found: Found) -> None:
    """Two exchanges a layer, and again where it is recomputed; as many for the gradients; and the sums."""
    config = make(case.model).config
    layers, width = config.num_hidden_layers, 8
    batch = BATCHES[case.batch]()
    rows, tokens = (
        batch["micro_batches"][0]["row"].input_ids if "micro_batches" in batch else batch["input_ids"]
    ).shape
    shared = max(ranks, 4 if case.model == "gpt2" else 2)
    own = -(-tokens // ranks)
    sent = layers * rows * own * (4 + 2 * shared + 4) * width * 8
    sequences = len(found.said["sums"])
    sums = {"allreduce_": (1 + len(OUTPUTS)) * sequences * 8}
    assert found.forward == ({"alltoall_base_": 2 * layers, "allreduce_": 1}, {"alltoall_base_": sent, **sums})
    times = 2 if case.model == CHECKPOINTED else 1
    assert found.backward == ({"alltoall_base_": 2 * times * layers}, {"alltoall_base_": times * sent})


@pytest.mark.parametrize(("ranks", "heads", "shared"), [(3, 4, 2), (4, 12, 3), (2, 3, 3), (4, 8, 6)])
def test_heads_that_cannot_be_shared_out_are_refused(
    ranks: int, heads: int, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.distributed.get_world_size", lambda group: ranks)
    monkeypatch.setattr("torch.distributed.get_rank", lambda group: 0)
    cut = HeadCut(object(), 8, torch.device("cpu"))  # type: ignore[arg-type]  # nothing is exchanged
    query, key = torch.zeros(1, heads, 2, 8), torch.zeros(1, shared, 2, 8)
    with pytest.raises(NotImplementedError, match=f"{heads} heads of queries and {shared} of .* {ranks} processes"):
        cut.to_heads(query, key, key)
