"""Reporters that are not there, and metrics that no evaluation has: said before anything is loaded or trained."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from broken_runs import id_rows
from tiny_models import make_model
from trainer_runs import config
from transformers.integrations import integration_utils

from fastdpo.trainer import DPOTrainer

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")

ROWS = id_rows(4, 90)


def test_a_reporter_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    with pytest.raises(
        ValueError, match=r"report_to names wandb, which cannot be used here .*--report_to none"
    ) as raised:
        DPOTrainer("no/such-model", args=config(tmp_path, report_to="wandb"), train_dataset=ROWS)
    assert len(str(raised.value).splitlines()) == 1
    with pytest.raises(ValueError, match=r"report_to is 'wandbb'; it should be among .*tensorboard"):
        DPOTrainer("no/such-model", args=config(tmp_path, report_to=["wandbb"]), train_dataset=ROWS)


def test_one_line_on_the_screen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, model: Path) -> None:
    from fastdpo.commands.cli import main

    monkeypatch.setattr(integration_utils, "is_wandb_available", lambda: False)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    words = f"fastdpo train --model_name_or_path {model} --dataset_name {pairs} --output_dir {tmp_path / 'run'}"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--report_to", "wandb", "--use_cpu"])
    code = main()
    said = capsys.readouterr().err
    assert code == 2
    assert "report_to names wandb, which cannot be used here" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("metric", "eval_dataset"),
    [
        ("rewards/margin", ROWS),
        ("eval_accuracy", ROWS),
        ("rewards/top1", ROWS),  # of rankings
        ("aux_loss", ROWS),  # of mixtures
        ("loss", {"a": ROWS, "b": ROWS}),
        ("c_loss", {"a": ROWS, "b": ROWS}),
    ],
)
def test_a_metric_that_no_evaluation_will_have(tmp_path: Path, metric: str, eval_dataset: Any) -> None:
    args = config(tmp_path, metric_for_best_model=metric, eval_strategy="steps", eval_steps=1)
    with pytest.raises(ValueError, match=r"metric_for_best_model is .* it should be one of eval_.*rewards/margins"):
        DPOTrainer(make_model("llama", 96), args=args, train_dataset=ROWS, eval_dataset=eval_dataset)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("names", [("",), ("a", "b")])
def test_all_metrics_that_are_named_are_there(tmp_path: Path, family: str, names: tuple[str, ...]) -> None:
    sets: Any = ROWS if names == ("",) else dict.fromkeys(names, ROWS)
    wrong = config(tmp_path, metric_for_best_model="none", eval_strategy="steps", eval_steps=1)
    with pytest.raises(ValueError, match="should be one of") as raised:
        DPOTrainer(make_model(family, 96), args=wrong, train_dataset=ROWS, eval_dataset=sets)
    named = str(raised.value).rpartition("should be one of ")[2].split(", ")
    args = config(tmp_path, metric_for_best_model=named[-4], eval_strategy="steps", eval_steps=1)
    trainer = DPOTrainer(make_model(family, 96), args=args, train_dataset=ROWS, eval_dataset=sets)
    assert set(named) <= trainer.evaluate().keys()
    assert any("aux_loss" in name for name in named) == (family == "mixtral")
