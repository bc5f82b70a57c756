"""Experts spread over processes: what a run does beside its steps is what one process does."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_runs import id_rows
from engine_matrix import ALONE, ENGINES, VOCABULARY, Cell, make_cell, small_model
from limited_ranks import run_limited
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "quiet_and_uncached")]

CELL = Cell("", "second model", "padded")
STEPS = 4
CASES: dict[str, dict[str, Any]] = {
    "clipped, accumulated, Adam": {
        "max_grad_norm": 0.5,
        "per_device_train_batch_size": 1,
        "optim": "adamw_torch",
        "adam_epsilon": 1e-3,  # or it would make as much of rounding as of a gradient, where there is none
        "weight_decay": 0.1,
    },
    "evaluated before and after": {"eval_dataset": id_rows(7, VOCABULARY), "per_device_eval_batch_size": 2},
    "checkpointed layers": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "saved": {"save_strategy": "steps", "save_steps": 2, "save_only_model": True},
    "load-balanced": {"router_aux_loss_coef": 0.1},
}
# Whose load-balancing loss is of each process's tokens has the loss of DDP; with tensor parallelism, of one process.
LIKE = {("EP", "load-balanced"): "DDP"}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "copies": ({"modules_to_save": ["lm_head"]}, "modules_to_save would train copies"),
    "experts": ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "the adapter's layers are a ParamWrapper"),
}


def train(case: str, name: str, folder: Path) -> dict[str, Any]:
    """Losses and norms of a run, and what is left of it, on a rank of an engine, or alone."""
    engine = ENGINES.get(name, ALONE)
    if name in ("", "DDP"):
        engine = replace(engine, models=functools.partial(small_model, family="mixtral"))
    options = {"max_steps": STEPS, **CASES[case]}
    if "per_device_train_batch_size" in options:
        options["gradient_accumulation_steps"] = 4 // engine.data_parallel
    found: dict[str, Any] = {}
    place = folder / case / (name or "alone")
    with engine.launch():
        trainer = make_cell(CELL, engine, place, **options)
        if "eval_dataset" in options:
            found["before"] = trainer.evaluate()["eval_loss"]
        trainer.train()
        if "eval_dataset" in options:
            found["after"] = trainer.evaluate()["eval_loss"]
        trainer.save_model(str(place / "end"))
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return found | {"steps": [entry[key] for entry in log for key in ("loss", "grad_norm")]}


def on_rank(work: str, folder: Path) -> Any:
    name, case = work.split(": ")
    if case not in REFUSED:
        return train(case, name, folder)
    adapter = LoraConfig(target_modules=["q_proj"], r=4, **REFUSED[case][0])
    engine = ENGINES[name]
    with engine.launch():
        try:
            make_cell(CELL, engine, folder / work, ref_model=None, peft_config=adapter)
        except NotImplementedError as error:
            return str(error)
    return ""


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("experts")
    works = [f"{name}: {case}" for name in ("EP", "EP x TP") for case in CASES]
    works += [f"DDP: {case}" for case in CASES if ("EP", case) in LIKE] + [f"EP: {case}" for case in REFUSED]
    outcomes = run_limited(
        functools.partial(on_rank, folder=folder), works, ranks=2, limit=60.0, folder=folder / "ranks"
    )
    assert not [outcome.error for each in outcomes.values() for outcome in each if outcome.error]
    return folder, {work: [outcome.value for outcome in each] for work, each in outcomes.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["EP", "EP x TP"])
def test_a_run_is_that_of_one_process(name: str, case: str, seen: tuple[Path, dict[str, Any]]) -> None:
    folder, found = seen
    other = LIKE.get((name, case), "")
    expected = found[f"{other}: {case}"][0] if other else train(case, "", folder)
    for of_rank in found[f"{name}: {case}"]:
        assert of_rank.keys() == expected.keys()
        for key in expected:
            assert of_rank[key] == pytest.approx(expected[key], rel=1e-5), key
    ours, theirs = (
        load_file(folder / case / which / "end" / "model.safetensors") for which in (name, other or "alone")
    )
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["EP", "EP x TP"])
def test_a_checkpoint_is_a_whole_model(name: str, seen: tuple[Path, dict[str, Any]]) -> None:
    folder = seen[0] / "saved" / name
    last = AutoModelForCausalLM.from_pretrained(folder / f"checkpoint-{STEPS}").state_dict()
    end = AutoModelForCausalLM.from_pretrained(folder / "end").state_dict()
    assert last.keys() == end.keys() and all(torch.equal(last[key], end[key]) for key in end)
    assert "distributed_config" not in (folder / "end" / "config.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("case", REFUSED)
def test_adapters_that_cannot_be_trained_are_refused(case: str, seen: tuple[Path, dict[str, Any]]) -> None:
    assert all(REFUSED[case][1] in said for said in seen[1][f"EP: {case}"])
