"""What a run with experts spread over processes cannot have is refused by name; that it trains is in test_matrix.py."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig
from tiny_models import make_model
from toy_data import text_rows
from trainer_runs import config
from transformers.distributed import DistributedConfig

from fastdpo.model.load_sharding import with_new_adapter
from fastdpo.trainer import DPOTrainer, expert_parallel
from fastdpo.trainer.expert_parallel import check_expert_parallel, check_expert_setting


@pytest.mark.parametrize(
    ("setting", "error", "words"),
    [
        ({"ep_size": 2}, ValueError, r"ep_size 2.*divide fsdp_size times tp_size \(1 times 1\): give fsdp_size: N and"),
        ({"ep_size": 2, "fsdp_size": 3}, ValueError, r"\(3 times 1\)"),
        ({"ep_size": 2, "tp_size": 4}, ValueError, r"multiple of tp_size \(4\)"),
        ({"tp_size": 2, "enable_expert_parallel": True}, NotImplementedError, "enable_expert_parallel: true.*Instead"),
        ({"tp_size": 2, "ep_size": 2, "tp_plan": {}}, NotImplementedError, r"tp_plan: \{\}.*Instead, give fsdp_size"),
        (
            {"tp_size": 2, "ep_size": 2, "ep_implementation": "deepgemm_megamoe"},
            NotImplementedError,
            "deepgemm_megamoe has no backward",
        ),
    ],
)
def test_a_setting_that_cannot_be_trained_is_refused_before_anything_is_loaded(
    setting: dict[str, Any], error: type[Exception], words: str, tmp_path
) -> None:
    args = config(tmp_path, model_init_kwargs={"distributed_config": setting})
    with pytest.raises(error, match=words):
        DPOTrainer("some/mixture", args=args, train_dataset=Dataset.from_list(text_rows(4)))


@pytest.mark.parametrize(
    "setting",
    [
        None,
        {"tp_size": 2},
        {"fsdp_size": 2, "ep_size": 2},
        {"tp_size": 2, "ep_size": 2},
        {"fsdp_size": 2, "enable_expert_parallel": True, "ep_size": 2},
        DistributedConfig(fsdp_size=4, ep_size=2),
    ],
)
def test_others_are_not(setting: Any) -> None:
    check_expert_setting({} if setting is None else {"distributed_config": setting})


def spread(**of_config: Any) -> Any:
    """A mixture that passes for one that was loaded so: that takes several processes."""
    model = make_model("mixtral")
    model._is_distributed_loading_by_transformers = True
    model.config.distributed_config = DistributedConfig(fsdp_size=2, ep_size=2, **of_config)
    return model


def test_a_model_without_spread_experts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ref_model, MixtralForCausalLM.*ep_size=2, but has no experts that its plan"):
        check_expert_parallel({"model": make_model("mixtral"), "ref_model": spread()})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: setattr(model, "is_quantized", True), "model, MixtralForCausalLM.* is quantised"),
        (
            lambda model: setattr(model.config, "_experts_implementation", "deepgemm_megamoe"),
            "deepgemm_megamoe, which has no backward",
        ),
        (lambda _: None, r"gate_up_proj among them, which is not.*do not train it"),
    ],
)
def test_what_cannot_be_trained_of_one_is_refused(change, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = spread()
    experts = model.model.layers[0].mlp.experts
    monkeypatch.setattr(expert_parallel, "spread_experts", lambda _: [("model.layers.0.mlp.experts", experts)])
    change(model)
    with pytest.raises(NotImplementedError, match=words):
        check_expert_parallel({"model": model})


def test_what_is_not_trained_may_be_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = spread()
    experts = model.model.layers[0].mlp.experts.requires_grad_(False)
    monkeypatch.setattr(expert_parallel, "spread_experts", lambda _: [("model.layers.0.mlp.experts", experts)])
    check_expert_parallel({"model": model, "ref_model": None})


@pytest.mark.parametrize("copying", [{"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 5]}])
def test_copies_of_what_fsdp_shards_are_refused(copying: dict[str, Any]) -> None:
    with pytest.raises(
        NotImplementedError, match=rf"MixtralForCausalLM.*{next(iter(copying))} would train copies.*FSDP2"
    ):
        with_new_adapter(spread(), LoraConfig(target_modules=["q_proj"], **copying))
