"""Models whose experts transformers spreads over processes are refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from datasets import Dataset
from ranks import on_ranks
from tiny_models import make_model
from toy_data import make_tokenizer, text_rows
from trainer_runs import config, make_trainer
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from fastdpo.trainer import DPOTrainer
from fastdpo.trainer.expert_parallel import refuse_expert_parallel

SPREAD = DistributedConfig(fsdp_size=2, ep_size=2)


def loaded_with(setting: DistributedConfig):
    """As if: it takes several processes to load one so."""
    model = make_model("mixtral")
    model.config.distributed_config = setting
    model._is_distributed_loading_by_transformers = True
    return model


@pytest.mark.parametrize("called", ["model", "ref_model"])
def test_a_loaded_model_is_refused_before_anything_is_done(called, tmp_path):
    models = {"model": make_model("mixtral"), "ref_model": make_model("mixtral", seed=1)}
    with pytest.raises(NotImplementedError, match=r"MixtralForCausalLM.* is expert-parallel .*ep_size=2.*FSDP2"):
        make_trainer(tmp_path, make_tokenizer(), **models | {called: loaded_with(SPREAD)})


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"fsdp_size": 2, "ep_size": 2}, "ep_size=2"),
        ({"tp_size": 2, "enable_expert_parallel": True}, "enable_expert_parallel=True"),
    ],
)
def test_so_is_a_name_that_would_be_loaded_so(setting, words, tmp_path):
    args = config(tmp_path, model_init_kwargs={"distributed_config": setting})
    with pytest.raises(NotImplementedError, match=f"some/mixture, is expert-parallel .*{words}"):
        DPOTrainer("some/mixture", args=args, train_dataset=Dataset.from_list(text_rows(4)))


def test_nothing_else_is():
    apart = make_model("mixtral")
    apart.config.distributed_config = SPREAD  # what another load left in the configuration
    others = {"a": loaded_with(DistributedConfig(fsdp_size=2)), "b": apart, "c": None, "d": "a/name"}
    refuse_expert_parallel(others, {})
    refuse_expert_parallel(others, {"distributed_config": {"tp_size": 2}})


def refused() -> str:
    """On a rank of two."""
    folder = Path(os.environ["EXPERTS_FOLDER"])
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=SPREAD)
    try:
        make_trainer(folder / "run", make_tokenizer(), model=model, rows=4)
    except NotImplementedError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_a_model_that_two_processes_loaded(tmp_path, monkeypatch):
    make_model("mixtral").save_pretrained(tmp_path)
    monkeypatch.setenv("EXPERTS_FOLDER", str(tmp_path))
    assert all("is expert-parallel" in said for said in on_ranks(refused, 2, tmp_path))
