"""Training on pairs that are read as they are needed."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from processes import spawn
from toy_data import chat_rows, make_tokenizer, text_rows, write_jsonl
from trainer_runs import make_trainer

from fastdpo.data import load_preferences, stream_preferences
from fastdpo.data.terms import DataError
from fastdpo.report.recorder import SnapshotSize
from fastdpo.report.snapshot_taker import SnapshotTaker

pytestmark = pytest.mark.usefixtures("quiet_and_uncached", "one_thread")
TOKENIZER = make_tokenizer()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "a.jsonl", [*chat_rows(3), *text_rows(5)])


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_stream_trains_as_its_rows_do(path: Path, tmp_path: Path) -> None:
    """Each step on all rows, so that their order is no matter."""
    found = []
    for rows in (load_preferences(str(path)), stream_preferences(str(path))):
        trainer = make_trainer(tmp_path, TOKENIZER, train_dataset=rows, per_device_train_batch_size=8, max_steps=3)
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-5) and len(set(found[0])) == 3


def test_a_stream_is_gone_on_with_where_it_was(path: Path, tmp_path: Path) -> None:
    def run(name: str, resume: bool = False, **options: Any) -> Any:
        rows = stream_preferences(str(path)).shuffle(seed=3, buffer_size=4)
        trainer = make_trainer(
            tmp_path / name, TOKENIZER, train_dataset=rows, save_steps=5, save_strategy="steps", **options
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-5") if resume else None)
        return trainer

    whole = run("whole", max_steps=7)
    again = run("whole", resume=True, max_steps=7)  # in the second pass
    assert losses(again) == losses(whole)
    for mine, theirs in zip(again.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_steps_go_over_the_end_of_a_stream(path: Path, tmp_path: Path) -> None:
    """Also where a step has more pairs than the stream."""
    rows = load_preferences(str(path))
    longer = concatenate_datasets([rows] * 6)
    options: dict[str, Any] = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5, "max_steps": 3}
    found = []
    for dataset in (longer, stream_preferences(str(path))):
        trainer = make_trainer(
            tmp_path, TOKENIZER, train_dataset=dataset, train_sampling_strategy="sequential", **options
        )
        trainer.train()
        found.append(losses(trainer))
    assert len(rows) < 15 and found[0] == found[1] and len(set(found[0])) == 3


def test_a_stream_of_which_nothing_is_left_is_refused(tmp_path: Path) -> None:
    rows = [row | {"chosen": ""} for row in text_rows(3)]
    with pytest.raises(DataError, match="no rows|No pair of the stream is left"):
        make_trainer(
            tmp_path, TOKENIZER, train_dataset=stream_preferences(str(write_jsonl(tmp_path / "a.jsonl", rows)))
        )


def test_the_report_looks_at_the_first_pairs_of_a_stream(path: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, TOKENIZER, train_dataset=stream_preferences(str(path)), max_steps=1)
    shot = SnapshotTaker(trainer, SnapshotSize(pairs=4, samples=2, max_new_tokens=2)).take()
    assert "first pairs of the training stream" in shot.rows_of and len(shot.margins) == 4


def _on_rank(rank: int, port: int, path: str, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.save(_losses_of_processes(path, Path(folder), processes=2), Path(folder) / f"rank{rank}.pt")


def _losses_of_processes(path: str, folder: Path, *, processes: int) -> list[float]:
    """Of five steps of four pairs each, on two files of eight together."""
    rows = stream_preferences([path, path]).shuffle(seed=3, buffer_size=4)
    options: dict[str, Any] = {"per_device_train_batch_size": 4 // processes, "max_steps": 5, "max_grad_norm": 0.0}
    trainer = make_trainer(folder, TOKENIZER, train_dataset=rows, optim="sgd", learning_rate=1e-2, **options)
    trainer.train()
    return losses(trainer)


@pytest.mark.slow
def test_processes_share_a_stream_as_one_reads_it(path: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn(_on_rank, (port, str(path), str(tmp_path)), nprocs=2)
    expected = _losses_of_processes(str(path), tmp_path / "one", processes=1)
    for rank in range(2):
        assert torch.load(tmp_path / f"rank{rank}.pt") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_steps": -1}, ValueError, "nobody knows how many pairs it has: give max_steps"),
        ({"precompute_ref_log_probs": True}, ValueError, "cannot be computed beforehand"),
        ({"eval_dataset": "stream"}, TypeError, "the eval dataset is a IterableDataset"),
    ],
)
def test_what_a_stream_cannot_have_is_refused(
    options: dict[str, Any], error: type[Exception], message: str, path: Path, tmp_path: Path
) -> None:
    options = {k: stream_preferences(str(path)) if v == "stream" else v for k, v in options.items()}
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, TOKENIZER, train_dataset=stream_preferences(str(path)), **options)


def test_reference_columns_of_a_stream_are_the_reference(tmp_path: Path) -> None:
    rows = [row | {"ref_chosen_logps": -40.0, "ref_rejected_logps": -40.0} for row in text_rows(4)]
    file = write_jsonl(tmp_path / "a.jsonl", rows)
    found = []
    for dataset in (Dataset.from_list(rows), stream_preferences(str(file))):
        trainer = make_trainer(tmp_path, TOKENIZER, train_dataset=dataset, per_device_train_batch_size=4)
        assert trainer.ref_model is None
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
