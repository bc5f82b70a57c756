"""Runs that come to numbers that are none: they stop, say where it began, and leave nothing of it behind."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_runs import id_rows, losses
from datasets import Dataset
from ranks import on_ranks
from safetensors.torch import load_file
from tiny_models import make_model
from torch import nn
from toy_data import make_tokenizer, text_rows, write_jsonl
from trainer_runs import make_trainer
from transformers import TrainerCallback

from fastdpo.commands.cli import main
from fastdpo.errors import DivergedError, InputError
from fastdpo.trainer import DPOConfig
from fastdpo.trainer.checkpoints import find_checkpoints
from fastdpo.trainer.finite import FiniteWatch, weights_not_finite
from fastdpo.trainer.step_rows import rows_of_step

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")
NAN, INF = math.nan, math.inf


@pytest.fixture(autouse=True)
def logs_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("fastdpo"), "propagate", True)


class AtStep(TrainerCallback):
    """Does something to the model before a step begins."""

    def __init__(self, step: int, what: Any) -> None:
        self.step, self.what = step, what

    def on_step_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        if state.global_step + 1 == self.step:
            self.what(model)


def set_weight(name: str, value: float) -> Any:
    def change(model: nn.Module) -> None:
        with torch.no_grad():
            model.get_parameter(name).view(-1)[5] = value

    return change


def run(folder: Path, **options: Any) -> Any:
    defaults = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "report_to": "none"}
    trainer = make_trainer(folder, make_tokenizer(), **(defaults | options))
    return trainer


def assert_nothing_of_it_is_left(folder: Path, trainer: Any, steps: list[int]) -> None:
    assert all(math.isfinite(loss) and loss for loss in losses(trainer))
    assert [int(path.name.rpartition("-")[2]) for path in find_checkpoints(folder)] == steps
    for path in folder.rglob("model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())
    for path in folder.rglob("trainer_state.json"):
        history = json.loads(path.read_text(), parse_constant=pytest.fail)["log_history"]
        assert all(entry["loss"] != 0 for entry in history)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("every", [1, 3])
def test_a_weight_that_is_none(value: float, every: int, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    trainer = run(tmp_path, callbacks=[AtStep(5, set_weight(name, value))], logging_steps=every)
    with pytest.raises(DivergedError) as error:
        trainer.train()
    said = str(error.value)
    assert said.startswith("step 5: the loss") and f"a weight is not finite ({name})" in said
    assert f"{tmp_path / 'checkpoint-4'} is kept" in said
    assert_nothing_of_it_is_left(tmp_path, trainer, [2, 4])


@pytest.mark.parametrize("parts", [{}, {"max_tokens_per_batch": 90, "per_device_train_batch_size": 3}])
def test_the_very_row_is_named(tmp_path: Path, parts: dict[str, Any]) -> None:
    rows = [{**row, "ref_chosen_logps": -40.0, "ref_rejected_logps": -40.0} for row in text_rows(12)]
    rows[7]["ref_rejected_logps"] = NAN
    trainer = run(tmp_path, train_dataset=Dataset.from_list(rows), max_steps=6, gradient_accumulation_steps=2, **parts)
    with (
        pytest.warns(UserWarning, match="do not agree"),
        pytest.raises(DivergedError) as error,
    ):  # the reference is made up
        trainer.train()
    said = str(error.value)
    prompt = rows[7]["prompt"][:20]
    assert f": the loss of row 7 ('{prompt}" in said and "all weights are finite" in said
    assert "the gradients of all" in said
    step = int(said.split(":")[0].removeprefix("step "))
    assert 7 in sum(rows_of_step(trainer, step), [])
    assert_nothing_of_it_is_left(tmp_path, trainer, [step for step in (2, 4) if step < int(said.split(":")[0][5:])])


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_the_rows_of_a_step_are_those_that_it_was_made_on(accumulation: int, tmp_path: Path) -> None:
    rows = id_rows(10, 300)
    seen: list[list[list[int]]] = []
    by_ids = {tuple(row["chosen_ids"] + row["rejected_ids"]): i for i, row in enumerate(rows)}
    assert len(by_ids) == len(rows)
    trainer = run(
        tmp_path,
        train_dataset=rows,
        max_steps=9,
        save_steps=4,
        gradient_accumulation_steps=accumulation,
        max_length=None,
        packing="padded",
    )
    collate = trainer.data_collator

    def collating(examples: list[dict[str, Any]]) -> Any:
        batch = collate(examples)
        batch["rows"] = torch.tensor([by_ids[tuple(row["chosen_ids"] + row["rejected_ids"])] for row in examples])
        return batch

    step = trainer.training_step

    def stepping(model: Any, inputs: Any, *args: Any) -> Any:
        if len(seen) <= trainer.state.global_step:
            seen.append([])
        seen[-1].append(inputs.pop("rows").tolist())
        return step(model, inputs, *args)

    trainer.data_collator, trainer.training_step = collating, stepping
    trainer.train()
    assert [rows_of_step(trainer, number + 1) for number in range(9)] == seen


def test_a_gradient_that_is_none_is_found_before_the_step(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"

    def hook(model: nn.Module) -> None:
        model.get_parameter(name).register_hook(lambda grad: grad.index_fill(0, torch.tensor([1]), INF))

    trainer = run(tmp_path, callbacks=[AtStep(3, hook)])
    with pytest.raises(DivergedError) as error:
        trainer.train()
    assert str(error.value).startswith(
        f"step 3: all losses are finite, the gradients of {name} are not finite, all weights are finite. "
    )
    assert_nothing_of_it_is_left(tmp_path, trainer, [2])
    assert not weights_not_finite(trainer.model)


def test_a_learning_rate_at_which_it_diverges(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = run(tmp_path, learning_rate=1e30, max_grad_norm=0, save_steps=1)
    with pytest.raises(DivergedError):
        trainer.train()
    assert_nothing_of_it_is_left(tmp_path, trainer, [int(p.name[11:]) for p in find_checkpoints(tmp_path)])


def test_weights_that_overflow_in_the_last_step_are_not_saved(tmp_path: Path) -> None:
    class Overflows(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
            if state.global_step == 3:
                set_weight("lm_head.weight", INF)(model)

    trainer = run(tmp_path, callbacks=[Overflows()], max_steps=4)
    with pytest.raises(DivergedError, match="after step 4, whose losses and gradients were finite: the optimiser's"):
        trainer.train()
    assert_nothing_of_it_is_left(tmp_path, trainer, [2])
    with pytest.raises(DivergedError, match=r"a weight is not finite \(lm_head.weight\)"):
        trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final").exists()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_model_that_is_none_at_the_start_is_refused(value: float, tmp_path: Path) -> None:
    model = make_model("llama")
    set_weight("model.norm.weight", value)(model)
    with pytest.raises(InputError, match=r"the model cannot be used: a weight is not finite \(model.norm.weight\)"):
        run(tmp_path, model=model)
    with pytest.raises(InputError, match=r"the reference model cannot be used: .*\(model.norm.weight\)"):
        run(tmp_path, ref_model=model)


def test_a_loss_that_blows_up_is_warned_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = run(tmp_path, max_steps=1)
    trainer.train()
    for loss in (5.0, 30.0, 60.0):
        trainer.log({"loss": loss, "grad_norm": 1.0})
    (said,) = [message for message in caplog.messages if "diverge" in message]
    assert "The loss is 30 at step 1, and was 0.693" in said
    with pytest.raises(DivergedError, match="the loss is inf at step 1"):
        trainer.log({"loss": INF})


def test_an_evaluation_that_is_none_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{**row, "ref_chosen_logps": -40.0, "ref_rejected_logps": NAN} for row in text_rows(2)]
    reference = {"ref_chosen_logps": [-40.0] * 6, "ref_rejected_logps": [-40.0] * 6}
    train = Dataset.from_dict(Dataset.from_list(text_rows(6)).to_dict() | reference)
    options = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    with pytest.warns(UserWarning, match="do not agree"):
        trainer = run(tmp_path, train_dataset=train, eval_dataset=Dataset.from_list(rows), **options)
        trainer.train()
    (said,) = [message for message in caplog.messages if "evaluation" in message]
    assert said.startswith("The evaluation at step 1 came to eval_loss")
    for path in tmp_path.rglob("trainer_state.json"):
        json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN and Infinity are no JSON
    entries = [entry for entry in trainer.state.log_history if "eval_runtime" in entry]
    assert len(entries) == 2 and all("eval_loss" not in entry for entry in entries)


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("beta", [1e19, 1e30])
def test_gradients_whose_norm_overflows_stop_the_run(beta: float, max_grad_norm: float, tmp_path: Path) -> None:
    """Clipped by an infinite norm they would all be 0, and the run would go on to its end without a step."""
    with pytest.raises(DivergedError, match="step 1: all losses are finite, each gradient is finite, and their norm"):
        run(tmp_path, beta=beta, max_grad_norm=max_grad_norm, max_steps=2).train()


def test_the_filter_of_losses_cannot_be_had(tmp_path: Path) -> None:
    assert DPOConfig(str(tmp_path)).logging_nan_inf_filter is False
    with pytest.raises(ValueError, match="logging_nan_inf_filter is on, .* leave it out"):
        DPOConfig(str(tmp_path), logging_nan_inf_filter=True)


def test_a_resume_without_a_step_has_no_loss(tmp_path: Path) -> None:
    run(tmp_path, max_steps=2).train()
    result = run(tmp_path, max_steps=2).train(resume_from_checkpoint=True)
    assert result.global_step == 2 and "train_loss" not in result.metrics


def test_the_command_stops_with_an_exit_code(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", text_rows(16))
    words = ["--model_name_or_path", str(model), "--dataset_name", str(pairs), "--output_dir", str(tmp_path / "run")]
    words += ["--learning_rate", "1e30", "--max_grad_norm", "0", "--max_steps", "6", "--save_steps", "1", "--use_cpu"]
    words += ["--per_device_train_batch_size", "2", "--report_pairs", "0", "--report_samples", "0"]
    assert main(["train", *words, "--logging_steps", "1"]) == 1
    said = capsys.readouterr()
    assert "the run diverged: step" in said.err and "Done" not in said.out
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "README.md").exists()
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "The run stopped: step" in page and ">nan<" not in page.lower()
    for path in (tmp_path / "run").rglob("trainer_state.json"):
        assert all(math.isfinite(entry["loss"]) for entry in json.loads(path.read_text())["log_history"])


def two_steps() -> list[Any]:
    """Of one rank: only one rank's second loss is none."""
    watch, model = FiniteWatch(), nn.Linear(3, 2)
    found = []
    for step in (1, 2):
        is_bad = (step, torch.distributed.get_rank()) == (2, 1)
        watch.see_losses(torch.tensor([0.5, NAN if is_bad else 0.5]))
        model.weight.grad, model.bias.grad = torch.ones(2, 3), torch.ones(2)
        watch.see_gradients(model)
        found.append(watch.end_of_step(step, torch.device("cpu")))
    return found


def test_all_processes_hear_of_it_after_the_same_step(tmp_path: Path) -> None:
    for rank, (first, second) in enumerate(on_ranks(two_steps, 2, tmp_path)):
        assert first is None
        assert (second.step, second.rows, second.gradients) == (2, [[1] if rank == 1 else []], [])


def test_a_device_is_read_one_step_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is read when, with a device that is none: pending steps are read once another one ended."""
    watch, model = FiniteWatch(), nn.Linear(3, 2)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: tensor)
    device = torch.device("cuda")

    def step(number: int, losses: list[float]) -> Any:
        watch.see_losses(torch.tensor(losses))
        model.weight.grad, model.bias.grad = torch.ones(2, 3), torch.ones(2)
        watch.see_gradients(model)
        return watch.end_of_step(number, device)

    assert step(1, [0.5, 0.2]) is None
    assert step(2, [0.5, NAN]) is None
    found = step(3, [0.5, 0.5])
    assert (found.step, found.rows, found.gradients, found.trained) == (2, [[1]], [], 2)
    assert watch.all_so_far() is None
    step(4, [INF])
    assert watch.all_so_far().step == 4
