"""Padded rows in several forwards: the same steps as in one, in two processes, compiled, and with experts."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from processes import spawn
from tiny_families import VOCABULARY, make_family
from torch import Tensor
from trainer_runs import GradientRecorder, config

from fastdpo.model import divided, row_collator
from fastdpo.trainer import DPOTrainer

COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")


def rows() -> Dataset:
    """Pairs of which one is so long that its batch is divided: another process's is not."""
    chance = random.Random(0)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    counts = [(4, 3, 9), (2, 5, 3), (9, 120, 8), (3, 3, 4), (5, 6, 7), (10, 3, 3), (8, 4, 9), (6, 6, 5)]
    return Dataset.from_list(
        [
            {name: [chance.randrange(4, VOCABULARY) for _ in range(n)] for name, n in zip(names, row, strict=True)}
            for row in counts
        ]
    )


Steps = list[dict[str, Tensor]]


def gradients(folder: Path, model_type: str, batch_size: int, **options: Any) -> tuple[Steps, list[int]]:
    """Of two steps; and in how many forwards their batches were taken, where that was in several."""
    recorder, forwards = GradientRecorder(), []
    counted = divided.joined

    def joined(pieces: Any, *args: Any) -> Tensor:
        if torch.is_grad_enabled():
            forwards.append(len(pieces))
        return counted(pieces, *args)

    divided.joined = joined
    try:
        trainer = DPOTrainer(
            make_family(model_type, trained=True),
            args=config(
                folder,
                per_device_train_batch_size=batch_size,
                per_device_eval_batch_size=batch_size,
                eval_strategy="epoch",
                max_grad_norm=0.0,
                optim="sgd",
                learning_rate=0.01,
                **options,
            ),
            train_dataset=rows(),
            eval_dataset=rows().select(range(3)),
            callbacks=[recorder],
        )
        trainer.train()
    finally:
        divided.joined = counted
    assert trainer.packing.layout == "padded"
    return recorder.steps, forwards


def assert_same(got: Steps, expected: Steps) -> None:
    assert len(got) == len(expected) == 2
    for ours, theirs in zip(got, expected, strict=True):
        ours = {name.removeprefix("module."): value for name, value in ours.items()}
        assert ours.keys() == theirs.keys()
        # Of all parameters together: float32, and weights that enlarge what is rounded.
        size, error = (
            torch.stack([x.double().norm() for x in values]).norm()
            for values in (theirs.values(), [ours[name] - x for name, x in theirs.items()])
        )
        assert error <= 1e-3 * size


def in_one_forward(monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any) -> Steps:
    with monkeypatch.context() as patch:
        patch.setattr(row_collator, "forwards_of", lambda *_: None)
        steps, forwards = gradients(*args, **options)
    assert forwards == []
    return steps


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        pytest.param(
            "bloom",
            {"torch_compile": True, "torch_compile_backend": "aot_eager"},
            id="compiled",
            marks=pytest.mark.slow,
        ),
        pytest.param("qwen3_next", {"router_aux_loss_coef": 0.5}, id="with a load-balancing loss"),
    ],
)
def test_steps_are_those_of_one_forward(tmp_path, monkeypatch, model_type, options):
    expected = in_one_forward(monkeypatch, tmp_path, model_type, 4, **options)
    got, forwards = gradients(tmp_path, model_type, 4, **options)
    assert max(forwards) > 1
    assert_same(got, expected)


def _on_rank(rank: int, port: int, folder: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    torch.save(gradients(Path(folder), "bloom", 2), f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    """Their batches are taken in different numbers of forwards, in the training and in the evaluation."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_on_rank, (port, str(tmp_path)), nprocs=2)
    expected = in_one_forward(monkeypatch, tmp_path, "bloom", 4)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert ranks[0][1] != ranks[1][1]
    for steps, _ in ranks:
        assert_same(steps, expected)
