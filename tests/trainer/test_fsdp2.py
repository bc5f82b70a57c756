"""The trainer on two processes among which FSDP2 shards policy and reference; the truth is one process's run.

One pair of processes makes every run, and each leaves what it found on both; a test reads that. The processes are set
up as ``accelerate launch`` does it, by environment variables.
"""

from __future__ import annotations

import math
import os
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from processes import spawn
from ranks import launched
from safetensors.torch import load_file
from tiny_models import make_model
from torch import Tensor
from torch.distributed.tensor import DTensor
from toy_data import make_tokenizer, text_rows
from trainer_runs import LOGP_TOLERANCE, METRICS, make_trainer
from transformers import AutoModelForCausalLM, PreTrainedModel

from fastdpo.model import packing_choice
from fastdpo.model.attention_backends import RowsNotSupportedError
from fastdpo.model.head import FusedHead
from fastdpo.ref_cache import RefCacheError
from fastdpo.trainer import DPOTrainer, fsdp2

pytestmark = pytest.mark.usefixtures("one_thread")

RANKS, STEPS, PAIRS = 2, 3, 4  # pairs a step, on all processes
VOCABULARY = 385  # odd: shards of 193 and 192 rows
ROUNDING = 1000 * torch.finfo(torch.float32).eps  # sums of some hundred terms, in another order

Options = dict[str, Any]


def llama(**options: Any) -> PreTrainedModel:
    return make_model("llama", VOCABULARY, **options)


def with_adapter(model: PreTrainedModel, *targets: str, trained: bool = False) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(target_modules=list(targets), r=4))
    if trained:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def make(folder: Path, processes: int, **options: Any) -> DPOTrainer:
    rows = Dataset.from_list(text_rows(PAIRS * STEPS))
    defaults = {
        "train_dataset": rows,
        "per_device_train_batch_size": PAIRS // processes,
        "per_device_eval_batch_size": PAIRS // processes,
        "max_steps": STEPS,
        "max_grad_norm": 0.0,
        "optim": "sgd",  # Adam makes as much of rounding as of a gradient, where there is none
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
    }
    if options.get("eval_strategy", "no") != "no":
        defaults |= {"eval_dataset": rows.select(range(5)), "eval_steps": 1, "eval_on_start": True}
    return make_trainer(folder, make_tokenizer(), **(defaults | options))


def run(folder: Path, processes: int, resume_from: str | None = None, **options: Any) -> dict[str, Any]:
    trainer = make(folder, processes, **options)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train(resume_from_checkpoint=resume_from)
    trainer.save_model()
    whole = trainer.accelerator.get_state_dict(trainer.model)  # empty but in the main process
    names = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    return {
        "log": trainer.state.log_history,
        "start": start,
        "weights": {name: value.clone() for name, value in whole.items() if name in names},
        # The last layers' weights stay together after a forward without a backward.
        "sharded": all(isinstance(p, DTensor) for p in _weights_of_layers(trainer)),
        "layout": trainer.packing.layout,
        "read": {name: (split.rows, split.rows_read) for name, split in trainer.reference_splits.items()},
    }


def _weights_of_layers(trainer: DPOTrainer) -> list[Tensor]:
    models = [model for model in (trainer.model, trainer.ref_model) if model is not None]
    return [p for model in models for name, p in model.named_parameters() if ".layers." in name]


EVALUATED = {"eval_strategy": "steps"}
CACHED = {"precompute_ref_log_probs": True, "precompute_ref_batch_size": 4}  # 3 batches: one process has one more
# What is trained, from the folder that all runs share; the same for one process as for two.
RUNS: dict[str, Callable[[Path], Options]] = {
    "second model": lambda _: {"model": llama(), "ref_model": llama(seed=1), **EVALUATED},
    "copy, tied": lambda _: {
        "model": llama(tie_word_embeddings=True),
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
    },
    "cached second model": lambda _: {"model": llama(), "ref_model": llama(seed=1), **CACHED, **EVALUATED},
    "cached policy, tied": lambda _: {"model": llama(tie_word_embeddings=True), **CACHED},
    "cached adapter": lambda _: {"model": with_adapter(llama(), "q_proj", "v_proj", trained=True), **CACHED},
    "read": lambda shared: {"model": llama(), "ref_cache": str(shared / "cache"), **CACHED},
    "adapter": lambda _: {"model": with_adapter(llama(), "q_proj", "lm_head"), **EVALUATED},
    "adapter, tied, padded": lambda _: {
        "model": with_adapter(llama(tie_word_embeddings=True), "q_proj", "v_proj"),
        "packing": "padded",
    },
    # Without its load-balancing loss, which is of each process's own tokens.
    "mixture": lambda _: {"model": make_model("mixtral", VOCABULARY), "router_aux_loss_coef": 0.0},
    "loaded": lambda shared: {"model": str(shared / "model")},
    "loaded, cached, adapter": lambda shared: {
        "model": str(shared / "model"),
        "peft_config": LoraConfig(target_modules=["q_proj", "v_proj"], r=4),
        **CACHED,
    },
}
# Only the main process has the weights, until they are sharded.
SETTINGS = {name: {"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"} for name in RUNS if name.startswith("loaded")}


# --------------------------------------------------------------------------------------- what the processes do besides


def resume(folder: Path, kind: str, make_policy: Callable[[], PreTrainedModel | PeftModel]) -> dict[str, Any]:
    """A run that leaves a checkpoint, and one that goes on from it."""
    options: Options = {"optim": "adamw_torch", "save_strategy": "steps", "save_steps": 2}
    with launched(FSDP_STATE_DICT_TYPE=kind):
        unbroken = run(folder, RANKS, model=make_policy(), **options)
        resumed = run(folder, RANKS, str(folder / "checkpoint-2"), model=make_policy(), **options)
    return {"unbroken": unbroken, "resumed": resumed}


def mixed_precision(folder: Path, **options: Any) -> dict[str, Any]:
    dtypes = set()
    score_row = FusedHead.score_row

    def watched(*args: Any, **kwargs: Any) -> Any:
        out = score_row(*args, **kwargs)
        dtypes.add(out.logps.dtype)
        return out

    with launched(), mock.patch.object(FusedHead, "score_row", watched):
        trainer = make(folder, RANKS, model=llama(), bf16=True, **EVALUATED, **options)
        trainer.train()
    return {
        "log": trainer.state.log_history,
        "dtypes": dtypes,
        "weights": {p.dtype for p in _weights_of_layers(trainer)},
    }


def evaluated_first(folder: Path, processes: int) -> dict[str, Any]:
    """What ``evaluate`` says before the training, and what the training makes after it."""
    trainer = make(folder, processes, model=llama(), ref_model=llama(seed=1), **EVALUATED)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.evaluate()
    sharded = all(isinstance(p, DTensor) for p in _weights_of_layers(trainer))
    trainer.train()
    of_one_process_alone = "eval_model_preparation_time"
    return {
        "log": [{k: v for k, v in entry.items() if k != of_one_process_alone} for entry in trainer.state.log_history],
        "start": start,
        "sharded": sharded,
        "weights": trainer.accelerator.get_state_dict(trainer.model),
    }


def evaluated_first_on_ranks(folder: Path) -> dict[str, Any]:
    with launched():
        return evaluated_first(folder, RANKS)


def balanced(folder: Path) -> dict[str, Any]:
    """A mixture with its load-balancing loss, whose routers are not there before they are sharded."""
    with launched():
        trainer = make(folder, RANKS, model=make_model("mixtral", VOCABULARY), router_aux_loss_coef=0.5, max_steps=1)
        trainer.train()
    return {"layout": trainer.packing.layout, **trainer.state.log_history[0]}


def freed(folder: Path) -> bool:
    """Whether what the cache was computed with is gone when the trainer is there."""
    sharded = []

    def watched(*args: Any) -> Any:
        model = shard_without_optimizer(*args)
        sharded.append(weakref.ref(model.get_input_embeddings().weight))
        return model

    shard_without_optimizer = fsdp2.shard_without_optimizer
    with launched(), mock.patch.object(fsdp2, "shard_without_optimizer", watched):
        make(folder, RANKS, model=llama(), **CACHED)
    return [reference() is None for reference in sharded]


def error_of(work: Callable[[], Any]) -> str | None:
    try:
        work()
    except (NotImplementedError, RefCacheError) as error:
        return f"{type(error).__name__}: {error}"


def refusals(folder: Path) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    with launched():
        trainer = make(folder, RANKS, model=llama())
        with mock.patch.object(packing_choice, "check_rows", side_effect=RowsNotSupportedError("it mixes rows")):
            found["rows"] = error_of(trainer.train)
            found["rows of the reference"] = error_of(lambda: make(folder, RANKS, model=llama(), **CACHED))
        make(folder / "of another model", RANKS, model=llama(), **CACHED)
        found["stale"] = error_of(lambda: make(folder / "of another model", RANKS, model=llama(seed=1), **CACHED))
    return found


CHECKS: dict[str, Callable[[Path], Any]] = {
    "resume, whole": lambda folder: resume(
        folder, "FULL_STATE_DICT", lambda: with_adapter(llama(), "q_proj", "lm_head")
    ),
    "resume, shards": lambda folder: resume(folder, "SHARDED_STATE_DICT", llama),
    "bf16": mixed_precision,
    "bf16, cached": lambda folder: mixed_precision(folder, **CACHED),
    "evaluated first": evaluated_first_on_ranks,
    "balanced": balanced,
    "freed": freed,
    "refusals": refusals,
}


def run_all(rank: int, shared: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
    dist.init_process_group("gloo", init_method=f"file://{shared}/rendezvous", rank=rank, world_size=RANKS)
    found: dict[str, Any] = {}

    def keep(name: str, work: Callable[[Path], Any]) -> None:
        try:
            found[name] = work(Path(shared) / "two" / name)
        except Exception:
            found[name] = traceback.format_exc()

    for name, options in RUNS.items():
        with launched(**SETTINGS.get(name, {})):
            keep(name, lambda folder, options=options: run(folder, RANKS, **options(Path(shared))))
    for name, check in CHECKS.items():
        keep(name, check)
    torch.save(found, f"{shared}/{rank}.pt")
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------ what is to be found


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fsdp2")
    llama().save_pretrained(folder / "model")
    return folder


@pytest.fixture(scope="module")
def expected(shared: Path, one_thread: None) -> dict[str, dict[str, Any]]:
    """One process's runs, which come first: it leaves the cache that two are to read."""
    return {name: run(shared / "one" / name, 1, **options(shared)) for name, options in RUNS.items()}


@pytest.fixture(scope="module")
def found(shared: Path, expected: dict[str, dict[str, Any]]) -> Callable[[str], list[Any]]:
    """What the run or the check of that name left on each rank."""
    spawn(run_all, (str(shared),), nprocs=RANKS)
    ranks = [torch.load(shared / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]

    def of(name: str) -> list[Any]:
        for rank in ranks:
            assert not isinstance(rank[name], str), rank[name]  # the run's own error
        return [rank[name] for rank in ranks]

    return of


def assert_same_log(got: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    names = {"loss", "grad_norm", *METRICS}
    names |= {f"eval_{name}" for name in names}
    assert len(got) == len(expected)
    for entry, other in zip(got, expected, strict=True):
        assert entry.keys() == other.keys()
        for name in names & other.keys():
            assert entry[name] == pytest.approx(other[name], rel=ROUNDING, abs=LOGP_TOLERANCE), name


def assert_same_training(got: dict[str, Tensor], expected: dict[str, Tensor], start: dict[str, Tensor]) -> None:
    """As far as float32 has it: what training changed, and the rounding of what it changed."""
    assert got.keys() == expected.keys()
    moved = 0
    for name, weight in expected.items():
        change = (weight - start[name]).norm()
        moved += change > 0
        rounding = torch.finfo(torch.float32).eps * weight.norm()
        assert (got[name] - weight).norm() <= ROUNDING * change + STEPS * rounding, name
    assert moved


def saved_weights(folder: Path) -> dict[str, Tensor]:
    (file,) = folder.glob("*.safetensors")
    return {
        name.replace(".weight", ".default.weight") if "lora" in name else name: v for name, v in load_file(file).items()
    }


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_as_one(name: str, found: Any, expected: Any) -> None:
    one, two = expected[name], found(name)
    for rank in two:
        assert rank["sharded"]
        assert rank["layout"] == one["layout"] == ("padded" if "padded" in name else "shared")
        assert_same_log(rank["log"], one["log"])
    assert_same_training(two[0]["weights"], one["weights"], one["start"])


def test_a_load_balancing_loss_is_there_in_rows_that_share(found: Any) -> None:
    for rank in found("balanced"):
        assert rank["layout"] == "shared"
        assert rank["loss"] == pytest.approx(math.log(2) + 0.5 * rank["aux_loss"], rel=1e-6)
        assert rank["aux_loss"] > 1


@pytest.mark.parametrize("name", RUNS)
def test_whole_weights_are_saved(name: str, shared: Path, found: Any) -> None:
    trained = found(name)[0]["weights"]
    saved = saved_weights(shared / "two" / name)
    if name == "mixture":  # its file has other names and shapes than the model
        saved = AutoModelForCausalLM.from_pretrained(shared / "two" / name).state_dict()
    for key, weight in trained.items():
        assert torch.equal(saved[key], weight), key
    if "tied" in name and "adapter" not in name:
        assert torch.equal(saved["lm_head.weight"], saved["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", [name for name in RUNS if "cached" in name])
def test_the_cache_is_computed_in_both_processes(name: str, found: Any, expected: Any) -> None:
    for rank in found(name):
        assert rank["read"] == expected[name]["read"]
        assert rank["read"]["train"] == (PAIRS * STEPS, 0)


def test_a_cache_of_one_process_is_read(found: Any, expected: Any) -> None:
    assert expected["read"]["read"] == {"train": (PAIRS * STEPS, 0)}
    for rank in found("read"):
        assert rank["read"] == {"train": (PAIRS * STEPS, PAIRS * STEPS)}


def test_a_model_can_be_evaluated_before_it_is_trained(shared: Path, found: Any) -> None:
    one, two = evaluated_first(shared / "one" / "evaluated first", 1), found("evaluated first")
    for rank in two:
        assert rank["sharded"]
        assert_same_log(rank["log"], one["log"])
    assert_same_training(two[0]["weights"], one["weights"], one["start"])


def test_what_the_cache_was_computed_with_is_freed(found: Any) -> None:
    assert found("freed") == [[True], [True]]


@pytest.mark.parametrize("kind", ["whole", "shards"])
def test_a_resumed_run_ends_with_the_same_bits(kind: str, shared: Path, found: Any) -> None:
    result = found(f"resume, {kind}")[0]
    unbroken, resumed = result["unbroken"]["weights"], result["resumed"]["weights"]
    saved = saved_weights(shared / "two" / f"resume, {kind}")
    for name, weight in unbroken.items():
        assert torch.equal(resumed[name], weight), name
        assert torch.equal(saved[name], weight), name
        assert not torch.equal(weight, result["unbroken"]["start"][name]), name
    assert result["resumed"]["log"][-2]["loss"] == result["unbroken"]["log"][-2]["loss"]


@pytest.mark.parametrize("name", ["bf16", "bf16, cached"])
def test_log_probabilities_are_float32_in_mixed_precision(name: str, found: Any, expected: Any) -> None:
    for rank in found(name):
        assert rank["dtypes"] == {torch.float32}
        assert rank["weights"] == {torch.float32}
        first, exact = rank["log"][0], expected["cached second model"]["log"][0]
        # The reference is the policy, to the last bit.
        assert first["eval_rewards/chosen"] == first["eval_rewards/rejected"] == 0
        assert first["eval_logps/chosen"] == pytest.approx(
            exact["eval_logps/chosen"], rel=torch.finfo(torch.bfloat16).eps
        )
        assert first["eval_logps/chosen"] != torch.tensor(first["eval_logps/chosen"]).bfloat16().item()


def test_what_is_refused(found: Any) -> None:
    for messages in found("refusals"):
        for kind in ("rows", "rows of the reference"):
            assert "it mixes rows. Use packing='padded'" in messages[kind]
        assert messages["stale"].startswith("RefCacheError") and "weights" in messages["stale"]
