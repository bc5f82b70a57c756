"""Other families, losses and settings than the matrix has, under tensor, context and sequence parallelism.

Each trains some steps as one process does: losses, gradient norms and metrics, of evaluations too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from broken_runs import id_rows
from engine_matrix import ALONE, ENGINES, PAIRS, VOCABULARY, Engine, Options, cut_model
from limited_ranks import Outcome, run_limited
from peft import LoraConfig
from tiny_models import make_model
from trainer_runs import make_trainer

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "quiet_and_uncached")]

SMALL = 0.1
# Relative, of what is not below SMALL, in float32; margins are small differences of log-probabilities.
TOLERANCES = {
    **dict.fromkeys(("loss", "grad_norm", "logps/chosen", "entropy", "aux_loss"), 2e-5),
    "rewards/margins": 1e-4,
    "rewards/accuracies": 1e-6,
    "num_tokens": 0.0,
}
EVALUATED: Options = {"eval_strategy": "steps", "eval_steps": 2, "eval_rows": 7}


@dataclass(frozen=True)
class Case:
    """What is trained beside the matrix.

    Attributes:
        kind, model: of the tiny model, and what it has otherwise than others.
        options: of the run.
        engines: with which of the matrix's.
        has_reference: there is a second model.
        rounding: how many times as much as in others may be rounding.
    """

    kind: str = "llama"
    model: Options = field(default_factory=dict)
    options: Options = field(default_factory=dict)
    engines: tuple[str, ...] = ("TP", "CP", "SP")
    has_reference: bool = True
    rounding: float = 1.0


PRODUCTS = ("TP x DP", "CP x DP", "SP x DP")
CASES = {
    "tied embeddings": Case("qwen3", {"tie_word_embeddings": True}),
    "windows and softcaps": Case("gemma2", {"sliding_window": 5}, EVALUATED),
    "biases": Case("qwen2", engines=("TP", "SP")),
    "one tensor for queries, keys and values": Case("phi3", engines=("TP", "CP")),
    "one head of keys": Case(model={"num_key_value_heads": 1}, engines=("CP", "SP")),
    "learned positions": Case("gpt2", engines=("CP", "SP")),
    "sinks": Case("gpt_oss", options={"router_aux_loss_coef": 0.0}, engines=("CP", "SP")),
    "mixture": Case("mixtral", options={"router_aux_loss_coef": 0.0}, engines=("CP", "SP")),
    "mixture, balanced": Case(
        "mixtral",
        options=EVALUATED | {"router_aux_loss_coef": 1.0, "gradient_accumulation_steps": 2},
        engines=("CP", "SP"),
    ),
    "mixture, balanced, packed": Case(
        "mixtral", options={"router_aux_loss_coef": 1.0, "packing": "shared"}, engines=("SP",)
    ),
    "scaled logits": Case("cohere", engines=("TP",)),
    "ipo, accumulated": Case(options={"loss_type": ["ipo"], "gradient_accumulation_steps": 2}),
    "no reference": Case(options={"loss_type": ["simpo"]}, has_reference=False, engines=("SP",)),
    "mixed losses": Case(options={"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    "weighted, Adam, clipped": Case(
        options={"use_weighting": True, "optim": "adamw_torch", "adam_epsilon": 1e-3, "max_grad_norm": 0.5}
    ),
    "divided at the shorter one": Case(options={"ld_alpha": 0.5}),
    "divided, packed": Case(options={"ld_alpha": 0.5, "packing": "shared"}, engines=("SP",)),
    "recomputed": Case(options={"gradient_checkpointing": True}),
    "recomputed, packed": Case(options={"gradient_checkpointing": True, "packing": "shared"}, engines=("SP",)),
    "adapter, recomputed": Case(
        options={
            "peft_config": LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=4),
            "learning_rate": 0.1,
            "gradient_checkpointing": True,
            "gradient_accumulation_steps": 2,
        },
        has_reference=False,
    ),
    # Under TP x DP the first step's gradients agree to 1e-6, as others' do; each step enlarges what was rounded.
    "products, evaluated": Case("gemma2", {"sliding_window": 5}, EVALUATED, engines=PRODUCTS, rounding=5.0),
    "epochs that end in part of a step": Case(
        options={"rows": 13, "max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2},
    ),
    "products, epochs": Case(  # of whole batches: accelerate fills up others with rows that come twice
        options={"rows": 12, "max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2},
        engines=PRODUCTS,
    ),
    "products, packed": Case(options=EVALUATED | {"packing": "shared"}, engines=("SP x DP",)),
}
RUNS = [(engine, name) for name, case in CASES.items() for engine in case.engines]


def tiny(seed: int, *, case: Case) -> Any:
    return make_model(case.kind, VOCABULARY, seed=seed, **case.model)


def models_of(engine: str, name: str) -> Callable[[int], Any]:
    whole = functools.partial(tiny, case=CASES[name])
    whole.__name__ = name  # type: ignore[attr-defined]  # by which it is written down
    if not engine.startswith("TP"):
        return whole
    sizes = {"tp_size": 2, "fsdp_size": 2} if engine == "TP x DP" else {"tp_size": 2}
    return functools.partial(cut_model, make=whole, **sizes)


def train(engine: Engine, name: str, folder: Path) -> list[dict[str, float]]:
    """The log."""
    case = CASES[name]
    options: Options = {
        "per_device_train_batch_size": PAIRS // engine.data_parallel,
        "per_device_eval_batch_size": PAIRS // engine.data_parallel,
        "max_steps": 3,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "learning_rate": 0.003,
        "lr_scheduler_type": "constant",
        "gradient_checkpointing": False,
        "packing": "padded",
        **case.options,
    }
    if case.has_reference:
        options["ref_model"] = engine.models(1)
    if (rows := options.pop("eval_rows", None)) is not None:
        options["eval_dataset"] = id_rows(rows, VOCABULARY)
    pairs = id_rows(options.pop("rows", 8 * PAIRS), VOCABULARY)
    trainer = make_trainer(folder, None, model=engine.models(0), train_dataset=pairs, **(options | engine.options))
    trainer.train()
    wanted = [*TOLERANCES, *(f"eval_{name}" for name in TOLERANCES)]
    return [{name: entry[name] for name in wanted if name in entry} for entry in trainer.state.log_history]


def on_rank(run: str, folder: Path) -> list[dict[str, float]]:
    named, _, name = run.partition(": ")
    engine = replace(ENGINES[named], models=models_of(named, name))
    with engine.launch():
        return train(engine, name, folder / run.replace(":", ""))


def of_one(name: str, folder: Path) -> list[dict[str, float]]:
    engine = replace(ALONE, models=models_of("", name))
    with engine.launch():
        return train(engine, name, folder)


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    """What each run that was chosen left on its ranks."""
    items = [item for item in request.session.items if item.module is request.module]
    wanted = [(item.callspec.params["engine"], item.callspec.params["name"]) for item in items]
    folder, outcomes = tmp_path_factory.mktemp("families"), dict[str, list[Outcome]]()
    for ranks in {ENGINES[engine].ranks for engine, _ in wanted}:
        names = [f"{engine}: {name}" for engine, name in wanted if ENGINES[engine].ranks == ranks]
        work = functools.partial(on_rank, folder=folder / "runs")
        outcomes |= run_limited(work, names, ranks=ranks, limit=60.0, folder=folder / str(ranks))
    return outcomes


_ONE: dict[str, list[dict[str, float]]] = {}


@pytest.mark.parametrize(("engine", "name"), RUNS)
def test_it_trains_as_one_process(engine: str, name: str, found: dict[str, list[Outcome]], tmp_path: Path) -> None:
    if name not in _ONE:
        _ONE[name] = of_one(name, tmp_path)
    expected = _ONE[name]
    assert sum("loss" in entry for entry in expected) >= 3
    for rank in found[f"{engine}: {name}"]:
        assert rank.error is None, rank.error
        assert [entry.keys() for entry in rank.value] == [entry.keys() for entry in expected]
        for got, entry in zip(rank.value, expected, strict=True):
            for key, value in entry.items():
                off = abs(got[key] - value) / max(abs(value), SMALL)
                allowed = CASES[name].rounding * TOLERANCES[key.removeprefix("eval_")]
                assert off <= allowed, (key, off, got, entry)
