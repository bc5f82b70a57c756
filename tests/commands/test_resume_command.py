"""``fastdpo train --resume_from_checkpoint``: what is damaged is passed over, written again, or refused by name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from made_checkpoints import make_checkpoint
from safetensors.torch import load_file
from toy_data import text_rows, write_jsonl

from fastdpo.commands.cli import main
from fastdpo.commands.flags import TrainParser
from fastdpo.commands.train import _take_over
from fastdpo.trainer.manifest import write_manifest

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")
STEPS = 3


@pytest.fixture(scope="module")
def words(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    pairs = write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", text_rows(8))
    flags = {"model_name_or_path": model, "dataset_name": pairs, "max_steps": STEPS, "save_steps": 1, "seed": 3}
    flags |= {"per_device_train_batch_size": 2, "logging_steps": 1, "report_pairs": 0, "report_samples": 0}
    flags |= {"learning_rate": 1e-3}
    return ["train", "--use_cpu", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def finished(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main([*words, "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def resume(words: list[str], run: Path, value: object = "last", *more: str) -> int:
    return main([*words, "--output_dir", str(run), "--resume_from_checkpoint", str(value), *more])


def state(run: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((run / "trainer_state.json").read_text())
    return state


def losses(run: Path) -> list[float]:
    return [entry["loss"] for entry in state(run)["log_history"] if "loss" in entry]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def assert_same_model(got: Path, expected: Path) -> None:
    tensors, others = (load_file(folder / "model.safetensors") for folder in (got, expected))
    assert tensors.keys() == others.keys() and all(tensors[name].equal(others[name]) for name in others)


def test_nothing_is_left_to_do(words: list[str], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    for value in ("last", "auto"):
        assert resume(words, run, value) == 0
        assert "Nothing to do: this run ends at" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_result_that_is_cut_is_written_again(
    name: str, words: list[str], run: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut(run / name)
    assert resume(words, run) == 0
    said = capsys.readouterr()
    assert f"is written again: {name} has" in " ".join(said.out.split())
    assert state(run)["global_step"] == STEPS and losses(run) == losses(finished)
    assert_same_model(run, finished)
    assert (run / name).stat().st_size == (finished / name).stat().st_size
    assert resume(words, run) == 0
    assert "Nothing to do" in capsys.readouterr().out


def test_the_checkpoint_before_a_damaged_one_is_gone_on_with(
    words: list[str], run: Path, finished: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    cut(run / f"checkpoint-{STEPS}" / "optimizer.pt")
    assert resume(words, run, "auto") == 0
    said = capsys.readouterr()
    everything = " ".join((said.out + said.err + caplog.text).split())
    assert f"checkpoint-{STEPS} is passed over: optimizer.pt has" in everything
    assert f"Going on from {run / f'checkpoint-{STEPS - 1}'}." in everything.replace("- ", "-")
    assert losses(run) == losses(finished)
    assert_same_model(run, finished)
    assert (run / "previous-1" / f"checkpoint-{STEPS}").is_dir()


def test_a_damaged_one_that_is_named_is_refused(
    words: list[str], run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = run / f"checkpoint-{STEPS}"
    (checkpoint / "scheduler.pt").unlink()
    assert resume(words, run, checkpoint) == 2
    said = capsys.readouterr().err
    assert f"{checkpoint} is damaged: scheduler.pt is missing" in said and "Traceback" not in said
    assert f"checkpoint-{STEPS - 1}" in said  # what there is in its place


def test_another_run_is_refused_in_a_line(words: list[str], run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert resume(words, run, "last", "--max_steps", "5", "--seed", "4") == 2
    said = capsys.readouterr().err
    assert "the run that is to be resumed was another one: seed was 3 and is 4" in said and "Traceback" not in said


def test_the_day_of_the_templates_stays_the_runs(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, 4)
    write_manifest(checkpoint, settings={"template_date": "2026-03-01"})
    for more, day in (([], "2026-03-01"), (["--template_date", "2025-12-24"], "2025-12-24")):
        parser = TrainParser()
        _, _, args, _ = parser.read(["--output_dir", str(tmp_path), "--use_cpu", *more])
        _take_over(checkpoint, args, parser)
        assert args.template_date == day
