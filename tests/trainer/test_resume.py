"""Resumed runs: to the unbroken run's bits, with what is asked for otherwise, or refused with the reason."""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_runs import differences, id_rows, losses, run
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_families import make_family
from tiny_models import make_model
from trainer_runs import GradientRecorder

from fastdpo.errors import InputError
from fastdpo.trainer import DPOConfig, DPOTrainer
from fastdpo.trainer.checkpoints import find_checkpoints
from fastdpo.trainer.manifest import MANIFEST_FILE, read_manifest, write_manifest
from fastdpo.trainer.resume_settings import settings_of
from fastdpo.trainer.weights import UnsavableError

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")

ROWS = id_rows(8, 90)


@pytest.fixture(autouse=True)
def logs_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("fastdpo"), "propagate", True)


def mixture() -> Any:
    """A model whose names and shapes on the disk are other ones than in memory."""
    return make_family("mixtral")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DPOTrainer]:
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, run(folder, mixture, ROWS)


# --------------------------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------------------------


def test_a_mixture_comes_back_to_the_last_bit(unbroken: tuple[Path, DPOTrainer], tmp_path: Path) -> None:
    folder, expected = unbroken
    got = run(tmp_path, mixture, ROWS, str(folder / "checkpoint-2"))
    assert differences(got, expected) == []
    assert len(losses(got)) == 4 and losses(got)[2] != losses(got)[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, "mixed"])
def test_whatever_the_weights_are_of(dtype: Any, tmp_path: Path) -> None:
    def make() -> Any:
        model = mixture().to(torch.bfloat16)
        if dtype == "mixed":
            model.lm_head.to(torch.float32)
            model.model.norm.to(torch.float32)
        return model

    expected = run(tmp_path, make, ROWS, packing="padded", bf16=dtype == "mixed")
    got = run(tmp_path, make, ROWS, str(tmp_path / "checkpoint-2"), packing="padded", bf16=dtype == "mixed")
    assert differences(got, expected) == []


def test_in_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    save = type(model).save_pretrained
    monkeypatch.setattr(type(model), "save_pretrained", lambda *a, **k: save(*a, **k, max_shard_size="20KB"))
    expected = run(tmp_path, lambda: make_model("llama"), ROWS)
    assert len(list((tmp_path / "checkpoint-2").glob("model-*.safetensors"))) > 1
    got = run(tmp_path, lambda: make_model("llama"), ROWS, str(tmp_path / "checkpoint-2"))
    assert differences(got, expected) == []
    part = sorted((tmp_path / "checkpoint-2").glob("model-*.safetensors"))[1]
    part.unlink()
    with pytest.raises(InputError, match=f"{part.name} is missing"):
        run(tmp_path, lambda: make_model("llama"), ROWS, str(tmp_path / "checkpoint-2"))


def lora(base: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **options))


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}], ids=str)
def test_an_adapter(options: dict[str, Any], tmp_path: Path) -> None:
    def make() -> Any:
        return lora(mixture(), **options)

    expected = run(tmp_path, make, ROWS)
    assert differences(run(tmp_path, make, ROWS, str(tmp_path / "checkpoint-2")), expected) == []

    def on_another_base() -> Any:
        model = make()
        with torch.no_grad():
            model.get_base_model().model.norm.weight[3] += 0.5
        return model

    with pytest.raises(InputError, match=r"other values: base_model.model.model.norm.weight\). If the base of an"):
        run(tmp_path, on_another_base, ROWS, str(tmp_path / "checkpoint-2"))


def test_what_is_trained_beside_an_adapter_and_not_saved_is_refused(tmp_path: Path) -> None:
    def make() -> Any:
        model = lora(mixture())
        model.get_base_model().model.norm.weight.requires_grad_(True)
        return model

    with pytest.raises(UnsavableError, match="base_model.model.model.norm.weight would be trained, but PEFT does not"):
        run(tmp_path, make, ROWS)


def test_the_best_model_is_loaded_whole(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = run(
        tmp_path, mixture, ROWS, eval_dataset=ROWS, metric_for_best_model="loss", greater_is_better=True, **options
    )
    best = Path(trainer.state.best_model_checkpoint)
    saved = type(trainer.model).from_pretrained(best, dtype=torch.float32).state_dict()
    assert best.name == "checkpoint-2"  # the larger loss
    assert all(torch.equal(value, saved[name]) for name, value in trainer.model.state_dict().items())


BEST = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "load_best_model_at_end": True}


@pytest.mark.parametrize("limit", [1, 2])
def test_the_last_checkpoint_stays_beside_the_best(limit: int, tmp_path: Path) -> None:
    options = BEST | {"save_steps": 1, "save_total_limit": limit, "greater_is_better": True, "eval_dataset": ROWS}
    trainer = run(tmp_path, mixture, ROWS, **options)
    best = Path(trainer.state.best_model_checkpoint)
    assert best.name == "checkpoint-1"
    assert [path.name for path in find_checkpoints(tmp_path)] == [best.name, "checkpoint-4"]


def test_the_best_checkpoint_is_found_where_the_folder_was_moved_to(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = BEST | {"save_steps": 1, "save_total_limit": 2, "greater_is_better": True, "eval_dataset": ROWS}
    run(tmp_path / "a", mixture, ROWS, max_steps=3, **options)
    (tmp_path / "a").rename(tmp_path / "b")
    trainer = run(tmp_path / "b", mixture, ROWS, resume=True, **options)
    best = tmp_path / "b" / "checkpoint-1"
    assert trainer.state.best_model_checkpoint == str(best)
    saved = type(trainer.model).from_pretrained(best, dtype=torch.float32).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in trainer.model.state_dict().items())
    assert not [said for said in caplog.messages if "exist" in said]
    shutil.rmtree(best)
    trainer = run(tmp_path / "b", mixture, ROWS, resume=True, **options | {"max_steps": 6})
    assert f"{best}, the best checkpoint so far, is gone; the best of those to come is chosen." in caplog.messages
    assert trainer.state.best_global_step in (5, 6)


def test_old_checkpoints_go_by_their_steps_whatever_clocks_say(tmp_path: Path) -> None:
    run(tmp_path, mixture, ROWS, max_steps=2, save_steps=1)
    for step in (1, 2):  # written on a machine whose clock is ahead
        os.utime(tmp_path / f"checkpoint-{step}", times=(4e9 + step, 4e9 + step))
    run(tmp_path, mixture, ROWS, resume=True, max_steps=4, save_steps=1, save_total_limit=2)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]


# --------------------------------------------------------------------------------------------------------------------
# Mutations of a checkpoint
# --------------------------------------------------------------------------------------------------------------------

EXPERT = "model.layers.0.block_sparse_moe.experts.1.w1.weight"


def dropped(tensors: dict[str, torch.Tensor], name: str) -> None:
    del tensors[name]


def renamed(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[f"{name}_"] = tensors.pop(name)


def altered(tensors: dict[str, torch.Tensor], name: str) -> None:
    tensors[name].view(-1)[0] += 1


@pytest.mark.parametrize("mutate", [dropped, renamed, altered])
@pytest.mark.parametrize("name", [EXPERT, "model.norm.weight", "lm_head.weight"])
@pytest.mark.parametrize("covered", [False, True], ids=["plain", "with a manifest that fits"])
def test_one_tensor_that_is_not_what_it_was(
    mutate: Any, name: str, covered: bool, unbroken: tuple[Path, DPOTrainer], tmp_path: Path
) -> None:
    """What the files' digests do not tell, because they were taken afterwards, the weights' do."""
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(unbroken[0] / "checkpoint-2", checkpoint)
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    assert name in tensors
    mutate(tensors, name)
    save_file(tensors, path, {"format": "pt"})
    seen = name
    if covered:
        manifest = read_manifest(checkpoint)
        write_manifest(checkpoint, weights=manifest.weights, settings=manifest.settings, rows=manifest.rows)
        # The live model has all experts in one tensor.
        seen = "model.layers.0.mlp.experts.gate_up_proj" if (name, mutate) == (EXPERT, altered) else name
    with pytest.raises(InputError) as error:
        run(tmp_path, mixture, ROWS, str(checkpoint))
    assert seen in str(error.value)


def test_a_checkpoint_of_a_model_of_another_shape(unbroken: tuple[Path, DPOTrainer], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be loaded|do not fit"):
        run(tmp_path, lambda: make_family("mixtral", hidden_size=64), ROWS, str(unbroken[0] / "checkpoint-2"))


def test_without_a_manifest_it_is_said_that_nothing_can_be_compared(
    unbroken: tuple[Path, DPOTrainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(unbroken[0] / "checkpoint-2", checkpoint)
    (checkpoint / MANIFEST_FILE).unlink()
    got = run(tmp_path, mixture, ROWS, str(checkpoint))
    assert differences(got, unbroken[1]) == []
    assert "has no manifest: another program or an older version wrote it" in caplog.text
    with pytest.raises(InputError, match="no whole checkpoint in"):
        run(tmp_path / "none", mixture, ROWS, resume=True)


def test_a_model_that_would_not_come_back_is_refused_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mixture()
    config = type(model.config)
    with monkeypatch.context() as patch:
        patch.setattr(config, "from_pretrained", lambda *_, **__: config(no_such_thing=1)[3])
        with pytest.raises(UnsavableError, match="configuration of a MixtralForCausalLM cannot be read again"):
            run(tmp_path, lambda: model, ROWS)
    # A parameter that its class does not know when it is made anew.
    model.model.extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(UnsavableError, match="does not bring it back .of no parameter: model.extra"):
        run(tmp_path, lambda: model, ROWS)
    assert not list(tmp_path.rglob(".round-trip-*"))


def test_a_row_that_loading_sets_to_0_is_refused_where_it_is_trained(tmp_path: Path) -> None:
    with pytest.raises(UnsavableError, match="row 0 of model.embed_tokens.weight is set to 0 when it is loaded"):
        run(tmp_path, lambda: make_family("youtu"), ROWS)
    untied = run(tmp_path, lambda: make_family("youtu", tie_word_embeddings=False), ROWS)
    got = run(tmp_path, lambda: make_family("youtu", tie_word_embeddings=False), ROWS, str(tmp_path / "checkpoint-2"))
    assert differences(got, untied) == []


# --------------------------------------------------------------------------------------------------------------------
# Settings
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": 7}, "seed was 42 and is 7"),
        ({"data_seed": 7}, "data_seed was not given and is 7"),
        ({"optim": "sgd"}, "optim was adamw_torch_fused and is sgd"),
        ({"per_device_train_batch_size": 1}, "pairs_per_step was 2 and is 1"),
        ({"gradient_accumulation_steps": 2}, "pairs_per_step was 2 and is 4"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy was random and is sequential"),
    ],
)
def test_a_run_of_other_rows_or_another_optimiser_is_refused(
    options: dict[str, Any], said: str, unbroken: tuple[Path, DPOTrainer], tmp_path: Path
) -> None:
    with pytest.raises(InputError) as error:
        run(tmp_path, mixture, ROWS, str(unbroken[0] / "checkpoint-2"), **options)
    assert said in str(error.value)
    if "optim" not in options:
        assert "--ignore_data_skip" in str(error.value)
        run(tmp_path, mixture, ROWS, str(unbroken[0] / "checkpoint-2"), ignore_data_skip=True, **options)


def test_other_rows_are_refused(unbroken: tuple[Path, DPOTrainer], tmp_path: Path) -> None:
    checkpoint = str(unbroken[0] / "checkpoint-2")
    with pytest.raises(InputError, match="it trained on 8 rows, and there are 7"):
        run(tmp_path, mixture, ROWS.select(range(7)), checkpoint)
    with pytest.raises(InputError, match="the rows are other ones, or in another order"):
        run(tmp_path, mixture, ROWS.select([1, 0, *range(2, 8)]), checkpoint)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beta": 0.5}, "beta was 0.1 and is 0.5"),
        ({"loss_type": ["hinge"]}, "loss_type was sigmoid and is hinge"),
        ({"max_length": 12}, "max_length was 1024 and is 12"),
        ({"packing": "padded"}, "packing was auto and is padded"),
        ({"max_grad_norm": 0.1}, "max_grad_norm was 1.0 and is 0.1"),
        ({"learning_rate": 1e-4}, "learning_rate was 0.001 and is 0.0001"),
        ({"weight_decay": 0.3}, "weight_decay was 0.0 and is 0.3"),
        ({"adam_beta2": 0.5}, "adam_beta2 was 0.999 and is 0.5"),
        ({"lr_scheduler_type": "constant"}, "lr_scheduler_type was linear and is constant"),
        ({"max_steps": 6}, "max_steps was 4 and is 6"),
    ],
)
def test_what_is_asked_for_is_said_and_done(
    options: dict[str, Any],
    said: str,
    unbroken: tuple[Path, DPOTrainer],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Against the two steps done by a fresh trainer that is given the checkpoint's model, optimiser and schedule."""
    folder, expected = unbroken
    recorder = GradientRecorder()
    got = run(tmp_path, mixture, ROWS, str(folder / "checkpoint-2"), callbacks=[recorder], **options)
    assert f"From step 2 on, otherwise than before: {said}." in caplog.text
    assert losses(got)[:2] == losses(expected)[:2]
    steps = got.args.max_steps
    rate = got.args.learning_rate
    shape = [1.0] * steps if got.args.lr_scheduler_type == "constant" else [1 - i / steps for i in range(steps)]
    rates = [entry["learning_rate"] for entry in got.state.log_history if "loss" in entry]
    assert rates[2:] == pytest.approx([rate * factor for factor in shape[2:]], rel=1e-12)
    group = got.optimizer.param_groups[0]
    asked = (got.args.weight_decay, (got.args.adam_beta1, got.args.adam_beta2))
    assert (group["weight_decay"], tuple(group["betas"])) == asked
    assert differences(got, expected) or options == {"packing": "padded"}
    assert_steps_are_torchs(got, recorder.steps, rates[2:], folder / "checkpoint-2")


def assert_steps_are_torchs(
    got: DPOTrainer, gradients: list[dict[str, torch.Tensor]], rates: list[float], checkpoint: Path
) -> None:
    """From the checkpoint on, with the gradients that there were, by an optimiser that was made for what is asked."""
    model = type(got.model).from_pretrained(checkpoint, dtype=torch.float32)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    betas = (got.args.adam_beta1, got.args.adam_beta2)
    optimizer = torch.optim.AdamW(parameters.values(), betas=betas, eps=got.args.adam_epsilon)
    decayed = got.get_decay_parameter_names(got.model)
    saved = torch.load(checkpoint / "optimizer.pt")
    # Trainer has two groups, of what is decayed and of what is not.
    names = [[n for n in parameters if n in decayed], [n for n in parameters if n not in decayed]]
    order = {name: i for name, i in zip(sum(names, []), range(len(parameters)), strict=True)}
    optimizer.load_state_dict(
        {
            "state": {i: saved["state"][order[name]] for i, name in enumerate(parameters)},
            "param_groups": optimizer.state_dict()["param_groups"],
        }
    )
    for step, rate in zip(gradients, rates, strict=True):
        with torch.no_grad():
            for name, p in parameters.items():
                p.mul_(1 - rate * got.args.weight_decay * (name in decayed))
                p.grad = step[name]
        optimizer.param_groups[0].update(lr=rate, weight_decay=0.0)
        optimizer.step()
    for name, p in parameters.items():
        torch.testing.assert_close(got.model.get_parameter(name), p, rtol=1e-5, atol=1e-7)


def test_nothing_is_said_of_an_equal_run(
    unbroken: tuple[Path, DPOTrainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path, mixture, ROWS, str(unbroken[0] / "checkpoint-2"), logging_steps=2, save_total_limit=1)
    assert "otherwise than before" not in caplog.text


def test_the_docs_have_every_setting_that_is_looked_at() -> None:
    page = (Path(__file__).parents[2] / "docs" / "guides" / "resume.md").read_text(encoding="utf-8")
    table = page[page.index("| changed | then |") :].split("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", table.replace("`reduce_lr_on_plateau`, `greedy`", "")))
    looked_at = set(settings_of(DPOConfig("nowhere", use_cpu=True))) - {"pairs_per_step"}
    assert named == looked_at
