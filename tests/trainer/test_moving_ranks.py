"""What moves with a run, on two processes as on one: a reference that follows the policy, and beta-DPO's threshold."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_runs import id_rows, losses
from processes import spawn
from tiny_models import make_model
from trainer_runs import config

from fastdpo.trainer import DPOTrainer

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
