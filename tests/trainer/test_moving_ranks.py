"""What moves with a run, on two processes as on one: a reference that follows the policy, and beta-DPO's threshold."""

from __future__ import annotations

import functools
import os
import socket
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_runs import id_rows, losses
from engine_matrix import ALONE, ENGINES, NEEDS_DEEPSPEED, PAIRS, VOCABULARY, Engine, small_model
from limited_ranks import run_limited
from processes import spawn
from safetensors.torch import load_file
from tiny_models import make_model
from trainer_runs import config, make_trainer

from fastdpo.trainer import DPOTrainer
from fastdpo.trainer.moving_reference import REFERENCE_FILE

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")

ROWS, RANKS = 8, 2
RUNS: tuple[dict[str, Any], ...] = (
    {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5},
    {"loss_type": "beta_dpo", "beta_dpo_alpha": 0.8},
)


def run(folder: Path, ranks: int, resume: Any = None, **options: Any) -> dict[str, Any]:
    rows = id_rows(ROWS, 90).add_column("weight", [1.0, 2.0, 0.5, 1.0, 3.0, 1.0, 1.0, 2.0])
    args = config(
        folder,
        max_steps=3,
        per_device_train_batch_size=ROWS // ranks,
        gradient_checkpointing=False,
        learning_rate=1e-3,
        max_grad_norm=0.0,
        optim="sgd",
        save_strategy="steps",
        save_steps=2,
        **options,
    )
    trainer = DPOTrainer(make_model("llama", 96), args=args, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    reference = {} if trainer.ref_model is None else dict(trainer.ref_model.named_parameters())
    return {
        "losses": losses(trainer),
        "reference": {name: p.detach().clone() for name, p in reference.items()},
        "threshold": trainer._batch_beta.threshold if trainer._batch_beta else None,
    }


def _on_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    found = []
    for number, options in enumerate(RUNS):
        there = Path(folder) / str(number)
        found.append([run(there, RANKS, **options), run(there, RANKS, str(there / "checkpoint-2"), **options)])
    torch.save(found, Path(folder) / f"rank{rank}.pt")


@pytest.mark.slow
def test_two_processes_are_as_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_on_rank, (port, str(tmp_path)), nprocs=RANKS)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(RANKS)]
    for number, options in enumerate(RUNS):
        one = run(tmp_path / "one" / str(number), 1, **options)
        for whole, resumed in (rank[number] for rank in ranks):
            assert whole["losses"] == pytest.approx(one["losses"], rel=1e-4)
            for name, expected in one["reference"].items():
                torch.testing.assert_close(whole["reference"][name], expected, rtol=1e-4, atol=1e-6)
                assert torch.equal(whole["reference"][name], resumed["reference"][name]), name
            if one["threshold"] is not None:
                assert whole["threshold"] == pytest.approx(one["threshold"], rel=1e-4) and one["threshold"] > 0
            assert (resumed["losses"], resumed["threshold"]) == (whole["losses"], whole["threshold"])


SHARDING = ["FSDP2", "FSDP1", "ZeRO-1", "ZeRO-2", "ZeRO-3"]
STEPS, SAVED = 10, 7


def follow(engine: Engine, folder: Path) -> dict[str, Any]:
    """Ten steps with a reference that follows every third, the same from a checkpoint on, and what that holds."""
    found: dict[str, Any] = {}
    for name, resume in (("whole", None), ("resumed", str(folder / f"checkpoint-{SAVED}"))):
        with engine.launch():
            trainer = make_trainer(
                folder,
                None,
                model=small_model(0),
                train_dataset=id_rows(PAIRS * STEPS, VOCABULARY),
                per_device_train_batch_size=PAIRS // engine.data_parallel,
                max_steps=STEPS,
                max_grad_norm=0.0,
                optim="adamw_torch",
                adam_epsilon=1e-3,  # or it would make as much of rounding as of a gradient, where there is none
                learning_rate=0.01,
                lr_scheduler_type="constant",
                gradient_checkpointing=False,
                save_strategy="steps",
                save_steps=SAVED,
                sync_ref_model=True,
                ref_model_sync_steps=3,
                ref_model_mixup_alpha=0.6,
                **engine.options,
            )
            trainer.train(resume_from_checkpoint=resume)
            found[name] = losses(trainer)
    return found | {"reference": load_file(folder / f"checkpoint-{SAVED}" / REFERENCE_FILE)}


def follow_on_rank(name: str, folder: Path) -> dict[str, Any]:
    return follow(ENGINES[name], folder / name)


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """One process's, and each engine's, by the way of one pair of processes."""
    folder = tmp_path_factory.mktemp("followed")
    names = SHARDING if find_spec("deepspeed") else SHARDING[:2]
    work = functools.partial(follow_on_rank, folder=folder)
    return follow(ALONE, folder / "alone"), run_limited(work, names, ranks=2, limit=120.0, folder=folder / "ranks")


@pytest.mark.slow
@pytest.mark.parametrize("name", SHARDING)
def test_a_sharded_reference_follows_as_a_whole_one(name: str, followed: Any) -> None:
    expected, outcomes = followed
    if name not in outcomes:
        pytest.skip(NEEDS_DEEPSPEED)
    for outcome in outcomes[name]:
        assert not outcome.error, outcome.error
        found = outcome.value
        assert found["whole"] == pytest.approx(expected["whole"], rel=1e-5)
        assert found["resumed"] == pytest.approx(found["whole"], rel=1e-6)
        assert found["reference"].keys() == expected["reference"].keys()
        for key, weight in expected["reference"].items():
            torch.testing.assert_close(found["reference"][key], weight, rtol=1e-5, atol=1e-6)
