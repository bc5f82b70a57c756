"""Rows cut over 2 and 3 gloo ranks: what one process says of whole ones, for the traffic that is said."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from float64 import KeepFloat64
from head_batches import make_batch
from ranks import on_ranks
from tiny_models import make_model
from torch import Tensor
from traffic import Traffic
from transformers import PreTrainedModel

from fastdpo.model.cut_check import check_cut
from fastdpo.model.cut_rows import CutAttention
from fastdpo.model.head import FusedHead
from fastdpo.model.scoring import Scorer, SequenceScores

pytestmark = pytest.mark.usefixtures("one_thread")

OUTPUTS = ("entropy", "mean_logits", "is_top1")
ROWS, TOKENS = 4, 38
# A sliding window and a softcap; heads of queries and keys that are as many, with positions that are learned.
MODELS: dict[str, dict[str, Any]] = {"llama": {}, "gemma2": {"sliding_window": 5}, "gpt2": {}}
CHECKPOINTED = "llama, recomputed"
# Of sums of some hundred terms: float64, and float32 where norms are in that.
TOLERANCE, ROUGH = 1e-10, 1e-5


def make(name: str) -> PreTrainedModel:
    kind = name.partition(",")[0]
    model = make_model(kind, dtype=torch.float64, **MODELS[kind])
    if name == CHECKPOINTED:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    return model


def in_float64(name: str) -> AbstractContextManager[Any]:
    # Which is not there where a backward computes a layer again.
    return contextlib.nullcontext() if name == CHECKPOINTED else KeepFloat64()


def batch() -> dict[str, Tensor]:
    made = make_batch(rows=ROWS, length=TOKENS)
    mask = (made.pop("labels") != -100).long()
    mask[:, TOKENS // 2] = 0  # a token in the middle that is not scored
    return made | {"completion_mask": mask}


def short_batch() -> dict[str, Tensor]:
    """The last rank's positions are padding, and the first one's at the beginning prompts."""
    return {name: x[:, :9] for name, x in batch().items()}


def gradients(model: PreTrainedModel, scores: SequenceScores) -> dict[str, Tensor]:
    weights = torch.linspace(-1, 1, len(scores.sums), dtype=torch.float64)
    (scores.sums.squeeze(1) * weights).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def said(scores: SequenceScores) -> dict[str, Tensor]:
    return {"sums": scores.sums.detach(), "lengths": scores.lengths, **scores.outputs}


def whole(name: str, rows: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = make(name)
    with in_float64(name):
        scores = Scorer(model, model, FusedHead(model)).score(rows, OUTPUTS)
        return said(scores), gradients(model, scores)


def cut(names: list[str]) -> dict[str, Any]:
    """What a rank finds, and what it sends."""
    found = {}
    for name in names:
        for rows in (batch(), short_batch()):
            model = make(name)
            scorer = Scorer(model, model, FusedHead(model), CutAttention(model), dist.group.WORLD)
            scorer.head.inspect(model)
            with in_float64(name):
                with Traffic() as forward:
                    scores = scorer.score(rows, OUTPUTS)
                # Where activations are recomputed, the backward belongs into the attention as well.
                with Traffic() as backward, scorer.attention.active():
                    grads = gradients(model, scores)
            for grad in grads.values():  # as FSDP does
                dist.all_reduce(grad)
                grad /= dist.get_world_size()
            found[name, rows["input_ids"].shape[1]] = (said(scores), grads, forward, backward)
    return {key: (*value[:2], *((dict(t.calls), dict(t.sent)) for t in value[2:])) for key, value in found.items()}


@pytest.mark.parametrize("ranks", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_cut_rows_are_whole_ones(ranks: int, tmp_path: Path) -> None:
    names = [*MODELS, CHECKPOINTED]
    found = on_ranks(partial(cut, names), ranks, tmp_path)
    for name in names:
        for rows in (batch(), short_batch()):
            expected, expected_gradients = whole(name, rows)
            tokens = rows["input_ids"].shape[1]
            for of_rank in found:
                tolerance = ROUGH if name == CHECKPOINTED else TOLERANCE
                got, grads, (calls, sent), (calls_back, sent_back) = of_rank[name, tokens]
                for key, values in expected.items():
                    torch.testing.assert_close(got[key], values, rtol=tolerance, atol=tolerance, msg=f"{name}, {key}")
                assert grads.keys() == expected_gradients.keys()
                largest = max(float(grad.norm()) for grad in expected_gradients.values())
                for key, grad in expected_gradients.items():
                    assert (grads[key] - grad).norm() <= tolerance * largest, (name, key)
                assert_traffic(name, ranks, tokens, calls, sent, calls_back, sent_back)


def assert_traffic(name: str, ranks: int, tokens: int, calls: Any, sent: Any, calls_back: Any, sent_back: Any) -> None:
    """Keys and values once a layer, and again where it is recomputed; their gradients once; and the sums."""
    config = make(name).config
    heads, width = (4 if name == "gpt2" else 2), 8  # of keys, and of values
    own = -(-tokens // (2 * ranks)) * 2
    keys_and_values = 2 * ROWS * heads * own * width * 8
    layers = config.num_hidden_layers
    sums = (2 + len(OUTPUTS)) * ROWS * 8
    assert calls == {"_allgather_base_": layers, "allreduce_": 1}, name
    assert sent == {"_allgather_base_": layers * keys_and_values, "allreduce_": sums}, name
    again = {"_allgather_base_": layers} if name == CHECKPOINTED else {}
    assert calls_back == {**again, "_reduce_scatter_base_": layers}, name
    assert sent_back["_reduce_scatter_base_"] == layers * ranks * keys_and_values, name


def checked(names: list[str]) -> list[str]:
    found = []
    for name in names:
        model = make_model(name)
        scorer = Scorer(model, model, FusedHead(model), CutAttention(model), dist.group.WORLD)
        try:
            check_cut(scorer, torch.device("cpu"), torch.float32)
            found.append("")
        except NotImplementedError as error:
            found.append(str(error))
    return found


def test_models_that_do_not_suit_are_refused(tmp_path: Path) -> None:
    # One whose layers carry a state; one that has no attention that could be replaced.
    for right, falcon, mamba in on_ranks(partial(checked, ["llama", "falcon_h1", "mamba"]), 2, tmp_path):
        assert right == ""
        for words, kind in ((falcon, "falcon_h1"), (mamba, "mamba")):
            assert kind in words and "cut over processes" in words and "cp_size 1" in words


def test_padding_before_the_tokens_is_refused() -> None:
    model, rows = make("llama"), batch()
    # Which is told before any rank is asked.
    scorer = Scorer(model, model, FusedHead(model), CutAttention(model), cast(dist.ProcessGroup, object()))
    for place in (0, 1):
        mask = rows["attention_mask"].clone()
        mask[1, place] = 0
        with pytest.raises(ValueError, match="padding before or among .* pad them on the right"):
            scorer.score(rows | {"attention_mask": mask})
