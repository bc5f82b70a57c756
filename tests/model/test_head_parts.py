"""Output embeddings that transformers' plans have cut over two gloo ranks: what one process says of the whole ones."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from head_batches import EPS, OUTPUTS, assert_same_gradients, from_logits, gradients, make_batch
from peft import LoraConfig, get_peft_model
from ranks import on_ranks
from tiny_models import make_model
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from fastdpo.model import head_calls
from fastdpo.model.head import FusedHead

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 385  # odd: parts of 193 and 192 entries
# A bias; a softcap; the weight that the input embedding has, too.
MODELS: dict[str, dict[str, Any]] = {"llama": {}, "phi": {}, "gemma2": {}, "qwen3": {"tie_word_embeddings": True}}


def load(folder: Path, **options: Any) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert isinstance(model, PreTrainedModel)
    return model


def plan(**rules: str) -> DistributedConfig:
    return DistributedConfig(tp_size=2, tp_plan=rules or "auto")


def whole(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in values.items()}


def scored(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    token_logps = head_calls.token_logps
    for name in MODELS:
        model = load(folder / name, distributed_config=plan())
        head, shapes = FusedHead(model), []

        def watched(hidden: Tensor, weight: Tensor, *args: Any, shapes: Any = shapes, **kwargs: Any) -> Any:
            shapes.append((tuple(weight.shape), type(weight) is DTensor, kwargs["group"] is not None))
            return token_logps(hidden, weight, *args, **kwargs)

        head_calls.token_logps = watched
        out = head(model, **make_batch(VOCABULARY), outputs=OUTPUTS)
        head_calls.token_logps = token_logps
        grads = whole(gradients(model, out.logps))
        found[name] = ({key: getattr(out, key).detach() for key in ("logps", "mask", *OUTPUTS)}, grads, shapes)
    found["refusals"] = refusals(folder)
    return found


def refusals(folder: Path) -> dict[str, str]:
    def of(model: Any) -> str:
        try:
            FusedHead(model)(model, **make_batch(VOCABULARY))
        except NotImplementedError as error:
            return str(error)
        return ""

    def adapted(**options: Any) -> Any:
        return get_peft_model(load(folder / "llama", distributed_config=plan()), LoraConfig(r=2, **options))

    cut_otherwise = load(folder / "llama", distributed_config=plan(**{"lm_head": "rowwise_rep"}))
    return {"adapter": of(adapted(target_modules=["lm_head"])), "otherwise": of(cut_otherwise)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("parts")
    for name, options in MODELS.items():
        make_model(name, VOCABULARY, **options).save_pretrained(folder / name)
    return on_ranks(partial(scored, folder), 2, folder)


@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_say_what_one_does(name: str, found: list[dict[str, Any]]) -> None:
    model = make_model(name, VOCABULARY, **MODELS[name])
    expected = from_logits(model, make_batch(VOCABULARY))
    expected_gradients = gradients(model, expected["logps"])
    for rank, of_rank in enumerate(found):
        got, grads, shapes = of_rank[name]
        # No logits, and no weight that was brought together.
        assert shapes == [((193 - rank, 32), False, True)]
        for key in ("mask", "is_top1"):
            assert torch.equal(got[key], expected[key]), key
        tolerance = 100 * EPS[torch.float32]
        for key in ("logps", "entropy", "log_sum_sq_probs", "mean_logits"):
            torch.testing.assert_close(got[key], expected[key].detach(), rtol=tolerance, atol=tolerance, msg=key)
        assert_same_gradients(grads, expected_gradients, rtol=1000 * EPS[torch.float32])


def test_what_is_refused(found: list[dict[str, Any]]) -> None:
    for of_rank in found:
        words = of_rank["refusals"]
        assert "tensor parallelism has cut over the vocabulary: take it out of target_modules" in words["adapter"]
        assert "otherwise than by its vocabulary" in words["otherwise"]
