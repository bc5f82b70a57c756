"""What a run needs beside its steps, under FSDP1 and DeepSpeed, on two processes: checkpoints, evaluation, parts.

The truth is one process's run. One pair of processes makes every check, and each leaves what it found.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_runs import id_rows, losses
from datasets import Dataset
from engine_matrix import (
    ALONE,
    ENGINES,
    NEEDS_DEEPSPEED,
    PAIRS,
    VOCABULARY,
    Engine,
    Options,
    few_steps,
    small_model,
    zero_launched,
    zero_options,
)
from limited_ranks import run_limited
from peft import LoraConfig, get_peft_model
from ranks import launched
from safetensors.torch import load_file
from torch import Tensor
from trainer_runs import make_trainer
from transformers.trainer_callback import TrainerState

from fastdpo.errors import DivergedError
from fastdpo.trainer import DPOTrainer
from fastdpo.trainer.zero import local_part

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread", "quiet_and_uncached")]

RANKS, STEPS = 2, 4
LIMIT = 180.0  # seconds for a check; on a busy machine some take a minute
TOLERANCE = 1e-5
ROUNDING = 1000 * torch.finfo(torch.float32).eps
SHARDING = ["FSDP1", "FSDP2", "ZeRO-1", "ZeRO-2", "ZeRO-3"]
LORA = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=4)


def offloaded(stage: int) -> Engine:
    return Engine(zero_launched, f"DEEPSPEED, stage {stage}", zero_options(stage, offload=True))


OTHERS = {
    "FSDP1, shards": Engine(lambda: launched(FSDP_VERSION="1", FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT"), ""),
    "ZeRO-2, offload": offloaded(2),
    "ZeRO-3, offload": offloaded(3),
}


def make(engine: Engine, folder: Path, **options: Any) -> DPOTrainer:
    return make_trainer(folder, None, **(few_steps(engine, STEPS) | engine.options | options))


def whole_file(folder: Path) -> dict[str, Tensor]:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def log_of(trainer: DPOTrainer) -> list[dict[str, float]]:
    names = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "entropy")
    wanted = {name: name for name in names} | {f"eval_{name}": name for name in names}
    return [{name: entry[name] for name in wanted if name in entry} for entry in trainer.state.log_history]


def two_models() -> Options:
    return {"model": small_model(0), "ref_model": small_model(1)}


# -------------------------------------------------------------------------------------------- what the processes do


def trained(engine: Engine, folder: Path, **options: Any) -> dict[str, Any]:
    """The log of a run, and the weights that ``save_model`` leaves."""
    trainer = make(engine, folder, **(two_models() | options))
    trainer.train()
    trainer.save_model()
    return {"log": log_of(trainer), "saved": whole_file(folder) if trainer.is_world_process_zero() else None}


def resumed(engine: Engine, folder: Path, **options: Any) -> dict[str, Any]:
    """An unbroken run, and one that goes on from its checkpoint."""
    options = {"save_strategy": "steps", "save_steps": 2} | options
    found: dict[str, Any] = {}
    for name, checkpoint in {"unbroken": None, "resumed": str(folder / "checkpoint-2")}.items():
        models = {"model": small_model(0)} if "peft_config" in options else two_models()
        trainer = make(engine, folder, **(models | options))
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        saved = whole_file(folder) if trainer.is_world_process_zero() else None
        found[name] = {"losses": losses(trainer), "log": log_of(trainer), "saved": saved}
    return found


def with_adapter_resumed(engine: Engine, folder: Path) -> dict[str, Any]:
    return resumed(engine, folder, peft_config=LORA)


def best(engine: Engine, folder: Path, **options: Any) -> dict[str, Any]:
    """A run that ends with the weights of an earlier step, by what it is told to call the best."""
    evaluation = {"eval_dataset": id_rows(5, VOCABULARY), "eval_strategy": "steps", "save_strategy": "steps"}
    evaluation |= {"eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    evaluation |= {"metric_for_best_model": "rewards/margins", "greater_is_better": False}
    found = trained(engine, folder, **(evaluation | options))
    state = TrainerState.load_from_json(str(folder / "checkpoint-4" / "trainer_state.json"))
    assert state.best_global_step == 2
    return found


def best_adapter(engine: Engine, folder: Path) -> dict[str, Any]:
    return best(engine, folder, model=small_model(0), ref_model=None, peft_config=LORA)


def evaluated(engine: Engine, folder: Path, **options: Any) -> dict[str, Any]:
    """Evaluations in the training, and before its first step."""
    evaluation = {"eval_dataset": id_rows(5, VOCABULARY), "eval_strategy": "steps", "eval_steps": 2}
    return trained(engine, folder, **(evaluation | {"eval_on_start": True} | options))


def evaluated_first(engine: Engine, folder: Path) -> dict[str, Any]:
    """``evaluate`` before the training, which it changes nothing of, and after it."""
    trainer = make(engine, folder, **two_models(), eval_dataset=id_rows(5, VOCABULARY))
    trainer.evaluate()
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    return {"log": log_of(trainer), "saved": whole_file(folder) if trainer.is_world_process_zero() else None}


def adapter_evaluated_first(engine: Engine, folder: Path) -> dict[str, Any]:
    trainer = make(engine, folder, model=small_model(0), peft_config=LORA, eval_dataset=id_rows(5, VOCABULARY))
    trainer.evaluate()
    trainer.train()
    trainer.save_model()
    return {"log": log_of(trainer), "saved": whole_file(folder) if trainer.is_world_process_zero() else None}


def rows_of_unlike_lengths() -> Dataset:
    """Of which one process's batch is taken in more parts than the other's."""
    lengths = [(40, 60), (5, 4), (6, 3), (4, 7)] * STEPS
    return Dataset.from_list(
        [
            {
                "prompt_ids": [3, 9, 17, 4 + i],
                "chosen_ids": list(range(7, 7 + a)),
                "rejected_ids": list(range(9, 9 + b)),
            }
            for i, (a, b) in enumerate(lengths)
        ]
    )


def in_parts(engine: Engine, folder: Path, **options: Any) -> dict[str, Any]:
    rows = rows_of_unlike_lengths()
    more: Options = {"train_dataset": rows, "max_tokens_per_batch": 40, "train_sampling_strategy": "sequential"}
    return evaluated(engine, folder, **(more | {"eval_dataset": rows.select(range(6))} | options))


def cache_in_parts(engine: Engine, folder: Path) -> dict[str, Any]:
    return in_parts(engine, folder, precompute_ref_log_probs=True)


def adapter_in_parts(engine: Engine, folder: Path) -> dict[str, Any]:
    return in_parts(engine, folder, model=small_model(0), ref_model=None, peft_config=LORA)


def accumulated(engine: Engine, folder: Path) -> dict[str, Any]:
    size = PAIRS // engine.data_parallel // 2
    return trained(engine, folder, per_device_train_batch_size=size, gradient_accumulation_steps=2)


def tied_and_copied(engine: Engine, folder: Path) -> dict[str, Any]:
    """The reference is a copy of a model with tied embeddings."""
    return trained(engine, folder, model=small_model(0, tie_word_embeddings=True), ref_model=None)


def cached_policy(engine: Engine, folder: Path) -> dict[str, Any]:
    """The reference is the policy itself, asked before the training; in a folder that a run after it reads."""
    options: Options = {"model": small_model(0), "ref_model": None, "precompute_ref_log_probs": True}
    options |= {"ref_cache": str(folder / "cache"), "precompute_ref_batch_size": 3}  # one has a batch more
    found = trained(engine, folder, **options)
    again = make(engine, folder, **(options | {"model": small_model(0)}))
    return found | {"read": again.reference_splits["train"].rows_read}


def adapter_on_head(engine: Engine, folder: Path) -> dict[str, Any]:
    return trained(engine, folder, model=small_model(0), ref_model=None, peft_config=on_head())


def adapter_on_head_refused(engine: Engine, folder: Path) -> str:
    """With FSDP1 PEFT's policy wraps what is trained, layer by layer, and the head has the weights no more; DeepSpeed
    loses the order of the modules in it."""
    with pytest.raises(NotImplementedError) as raised:
        adapter_on_head(engine, folder)
    return str(raised.value)


def on_head() -> LoraConfig:
    return LoraConfig(target_modules=["q_proj", "lm_head"], r=4)


def held(engine: Engine, folder: Path) -> float:
    """The part of the reference's layers that this process holds, once it was used."""
    trainer = make(engine, folder, **two_models(), max_steps=1)
    trainer.train()
    model: Any = trainer.ref_model
    layers = [(name, p) for name, p in model.named_parameters() if "layers.0." in name]
    whole = sum(p.numel() for name, p in small_model(1).named_parameters() if "layers.0." in name)
    return sum(getattr(local_part(p), "_local_tensor", local_part(p)).numel() for _, p in layers) / whole


def diverged(engine: Engine, folder: Path) -> str:
    """What is said of a run whose weights become infinite at its second step, of which nothing is saved."""
    trainer = make(engine, folder, **two_models(), optim="sgd", learning_rate=1e38, max_grad_norm=0.0, save_steps=1)
    with pytest.raises(DivergedError) as raised:
        trainer.train()
    assert not (folder / "model.safetensors").exists()
    return str(raised.value)


def loaded(engine: Engine, folder: Path, **options: Any) -> dict[str, Any]:
    """By name, so that ZeRO-3 divides the models as they are read."""
    if engine is ALONE or torch.distributed.get_rank() == 0:
        model = small_model(0)
        model.save_pretrained(folder / "model")
    if engine is not ALONE:
        torch.distributed.barrier()
    return trained(engine, folder / "run", model=str(folder / "model"), ref_model=None, **options)


def loaded_adapter(engine: Engine, folder: Path) -> dict[str, Any]:
    return loaded(engine, folder, peft_config=LORA)


def loaded_cache(engine: Engine, folder: Path) -> dict[str, Any]:
    return loaded(engine, folder, precompute_ref_log_probs=True)


def loaded_trained_adapter_cache(engine: Engine, folder: Path) -> dict[str, Any]:
    """An adapter that was trained before, whose reference is what it is now."""
    if engine is ALONE or torch.distributed.get_rank() == 0:
        model = small_model(0)
        model.save_pretrained(folder / "base")
        adapted = get_peft_model(type(model).from_pretrained(folder / "base"), LORA)
        torch.manual_seed(0)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        adapted.save_pretrained(folder / "adapter")
    if engine is not ALONE:
        torch.distributed.barrier()
    options: Options = {"model": str(folder / "adapter"), "ref_model": None, "precompute_ref_log_probs": True}
    return trained(engine, folder / "run", **options)


def log_probabilities_keep_their_type(engine: Engine, folder: Path) -> dict[str, Any]:
    """In bfloat16: what goes into the loss is not rounded; policy and reference agree before the first step."""
    trainer = make(engine, folder, model=small_model(0), bf16=True, use_cpu=engine.options.get("use_cpu", True))
    given = {"ref_chosen_logps": torch.tensor([-150.37], dtype=torch.float64)}
    kept = trainer._prepare_inputs(given)["ref_chosen_logps"]
    trainer.train()
    first = trainer.state.log_history[0]
    return {
        "kept": kept,
        "computed": {p.dtype for p in trainer.model.parameters()},
        "margin": first["rewards/margins"],
        "logps": first["logps/chosen"],
    }


COMPARED: dict[str, Callable[[Engine, Path], Any]] = {
    "evaluated": evaluated,
    "evaluated first": evaluated_first,
    "adapter evaluated first": adapter_evaluated_first,
    "parts": in_parts,
    "cache in parts": cache_in_parts,
    "adapter in parts": adapter_in_parts,
    "accumulated": accumulated,
    "tied and copied": tied_and_copied,
    "cached policy": cached_policy,
    "adapter on the head": adapter_on_head,
    "best": best,
    "best adapter": best_adapter,
    "loaded": loaded,
    "loaded, new adapter": loaded_adapter,
    "loaded, cached": loaded_cache,
    "loaded, cached, trained adapter": loaded_trained_adapter_cache,
}
AS_ONE = {f"{engine}: {name}": (engine, check) for engine in SHARDING for name, check in COMPARED.items()}
del AS_ONE["FSDP1: adapter on the head"], AS_ONE["ZeRO-3: adapter on the head"]  # refused
AS_ONE |= {f"{engine}: trained": (engine, trained) for engine in OTHERS}
AS_ONE |= {f"FSDP1, shards: {name}": ("FSDP1, shards", COMPARED[name]) for name in ("best", "best adapter")}
RESUMED = {f"{engine}: resumed": (engine, resumed) for engine in (*SHARDING, *OTHERS)}
RESUMED |= {f"{engine}: adapter resumed": (engine, with_adapter_resumed) for engine in SHARDING}
RESUMED["FSDP1, shards: adapter resumed"] = ("FSDP1, shards", with_adapter_resumed)
HELD = {f"{engine}: held": (engine, held) for engine in SHARDING}
DIVERGED = {f"{engine}: diverged": (engine, diverged) for engine in SHARDING}
HALVES = {f"{engine}: bf16": (engine, log_probabilities_keep_their_type) for engine in ("ZeRO-1", "ZeRO-2", "ZeRO-3")}
REFUSED = {f"{engine}: adapter on the head": (engine, adapter_on_head_refused) for engine in ("FSDP1", "ZeRO-3")}
CHECKS = {**AS_ONE, **RESUMED, **HELD, **DIVERGED, **HALVES, **REFUSED}


def on_rank(name: str, folder: Path) -> Any:
    named, check = CHECKS[name]
    engine = (ENGINES | OTHERS)[named]
    with engine.launch():
        return check(engine, folder / name)


# ------------------------------------------------------------------------------------------------ what is to be found


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Any]]:
    """What a check left on each rank; all that were chosen are made at the first call."""
    wanted = [item.callspec.params["name"] for item in request.session.items if item.module is request.module]
    if find_spec("deepspeed") is None:
        wanted = [name for name in wanted if not name.startswith("ZeRO")]
    folder = tmp_path_factory.mktemp("engines")
    work = functools.partial(on_rank, folder=folder / "runs")
    outcomes = run_limited(work, wanted, ranks=RANKS, limit=LIMIT, folder=folder)

    def of(name: str) -> list[Any]:
        if name.startswith("ZeRO"):
            pytest.importorskip("deepspeed", reason=NEEDS_DEEPSPEED)
        for rank in outcomes[name]:
            assert rank.error is None, rank.error
        return [rank.value for rank in outcomes[name]]

    return of


_ALONE: dict[Callable[..., Any], Any] = {}


def expected(check: Callable[[Engine, Path], Any], folder: Path) -> Any:
    if check not in _ALONE:
        _ALONE[check] = check(ALONE, folder)
    return _ALONE[check]


def assert_same_log(got: list[dict[str, float]], expected: list[dict[str, float]], **tolerance: float) -> None:
    got, expected = ([entry for entry in log if entry] for log in (got, expected))
    assert len(got) == len(expected)
    for entry, other in zip(got, expected, strict=True):
        assert entry == pytest.approx(other, **tolerance)


def assert_same_weights(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    if not any("lora" in name for name in got):
        assert got.keys() - {"lm_head.weight"} == expected.keys() - {"lm_head.weight"}  # written twice, if it is tied
    else:
        assert got.keys() == expected.keys()
    for name, weight in expected.items():
        assert (got[name] - weight).norm() <= ROUNDING * weight.norm(), name


@pytest.mark.parametrize("name", AS_ONE)
def test_two_processes_are_as_one(name: str, found: Any, tmp_path: Path) -> None:
    ranks, one = found(name), expected(AS_ONE[name][1], tmp_path)
    for rank in ranks:
        assert_same_log(rank["log"], one["log"], rel=TOLERANCE, abs=1e-4)
        assert rank.get("read") == one.get("read")
    assert_same_weights(ranks[0]["saved"], one["saved"])


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_with_the_same_bits(name: str, found: Any) -> None:
    first = found(name)[0]
    for rank in found(name):
        assert rank["resumed"]["losses"] == rank["unbroken"]["losses"]
    assert first["resumed"]["saved"].keys() == first["unbroken"]["saved"].keys()
    for key, weight in first["unbroken"]["saved"].items():
        assert torch.equal(first["resumed"]["saved"][key], weight), key


@pytest.mark.parametrize("name", HELD)
def test_the_reference_is_divided_where_the_policy_is(name: str, found: Any) -> None:
    for part in found(name):
        divides = not name.startswith(("ZeRO-1", "ZeRO-2"))
        assert part == pytest.approx(0.5 if divides else 1, rel=0.1)


@pytest.mark.parametrize("name", DIVERGED)
def test_what_is_not_finite_stops_the_run(name: str, found: Any) -> None:
    for message in found(name):
        assert "not finite" in message


@pytest.mark.parametrize("name", HALVES)
def test_log_probabilities_are_not_rounded_to_16_bits(name: str, found: Any) -> None:
    for rank in found(name):
        assert rank["kept"].dtype == torch.float64 and rank["kept"].item() == -150.37
        assert rank["computed"] == {torch.bfloat16}
        assert rank["margin"] == 0 and rank["logps"] != torch.tensor(rank["logps"]).bfloat16().item()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, found: Any) -> None:
    for message in found(name):
        assert "on its output embedding" in message
