"""Run files as TRL and the Alignment Handbook have them, with models and data of ours in the place of the Hub's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from tiny_vision import make_processor, make_vision_model, vision_rows
from toy_data import chat_rows, text_rows, write_jsonl

from fastdpo.commands.arguments import ModelArguments
from fastdpo.commands.cli import main
from fastdpo.commands.flags import TrainParser
from fastdpo.commands.trainer_from_flags import leave_out_masks, make_trainer

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")

# What keeps a run short, and off devices; everything else is the file's.
SHORT = "--use_cpu --max_steps 1 --max_length 48 --report_pairs 0 --report_samples 0 --save_strategy no"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as sets on the Hub are: with splits, of strings or of messages."""
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (("texts", text_rows), ("chats", chat_rows)):
        (folder / name).mkdir()
        for split, count in (("train", 12), ("test", 4)):
            write_jsonl(folder / name / f"{split}.jsonl", rows(count))
    return folder


def run(values: dict[str, Any], output_dir: Path, *words: str) -> dict[str, Any]:
    """The file's run, and the last line of its log with a loss."""
    file = output_dir.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    assert main(["train", "--config", str(file), "--output_dir", str(output_dir), *SHORT.split(), *words]) == 0
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return next(entry for entry in history if "loss" in entry)


# The keys of TRL's files: examples/cli_configs/example_config.yaml, and those of its page on the command line.
TRL_FILES: dict[str, dict[str, Any]] = {
    "example": {
        "env": {"TOKENIZERS_PARALLELISM": "false"},
        "model_name_or_path": "MODEL",
        "dataset_name": "DATA/texts",
        "report_to": "none",
        "learning_rate": 0.0002,
        "lr_scheduler_type": "cosine",
    },
    "mixture": {
        "model_name_or_path": "MODEL",
        "datasets": [{"path": "DATA/texts"}, {"path": "DATA/texts", "split": "test"}],
    },
}


def filled(values: Any, model: Path, data: Path) -> Any:
    text = json.dumps(values).replace("MODEL", str(model)).replace("DATA", str(data))
    return json.loads(text)


@pytest.mark.parametrize("name", TRL_FILES)
def test_files_of_trl_run(name: str, model: Path, data: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "")
    line = run(filled(TRL_FILES[name], model, data), tmp_path / "run")
    assert line["loss"] == pytest.approx(0.6931, abs=1e-4)
    summary = json.loads((tmp_path / "run" / "data_summary.json").read_text())
    assert summary["train"]["rows_in"] == (16 if name == "mixture" else 12)


# The command lines that its scripts for DPO begin with, and what they are on.
LINES = {
    "whole": "--dataset_name DATA/chats --model_name_or_path MODEL --learning_rate 3.0e-7 --num_train_epochs 1 "
    "--per_device_train_batch_size 3 --max_steps 900 --gradient_accumulation_steps 4 --eval_strategy steps "
    "--eval_steps 1 --no_remove_unused_columns",
    "adapter": "--dataset_name DATA/chats --model_name_or_path MODEL --learning_rate 3.0e-6 --num_train_epochs 1 "
    "--per_device_train_batch_size 3 --max_steps 900 --gradient_accumulation_steps 4 --eval_strategy steps "
    "--eval_steps 1 --no_remove_unused_columns --use_peft --lora_r 4 --lora_alpha 2",
}


@pytest.mark.parametrize("name", ["adapter", pytest.param("whole", marks=pytest.mark.slow)])
def test_command_lines_of_trl_run(name: str, model: Path, data: Path, tmp_path: Path) -> None:
    words = LINES[name].replace("MODEL", str(model)).replace("DATA", str(data)).split()
    assert main(["train", *words, "--output_dir", str(tmp_path / "run"), *SHORT.split()]) == 0
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert any("eval_loss" in entry for entry in history)


@pytest.mark.parametrize(
    ("losses", "streaming"),
    [
        pytest.param([], [], marks=pytest.mark.slow, id="sigmoid"),
        pytest.param([], ["--dataset_streaming", "--max_steps", "100"], id="streaming"),
        pytest.param(
            ["--loss_type", "sigmoid", "bco_pair", "sft", "--loss_weights", "0.8", "0.2", "1"],
            ["--num_train_epochs", "1"],
            marks=pytest.mark.slow,
            id="mixed",
        ),
    ],
)
def test_command_lines_of_trl_about_images_run(losses: list[str], streaming: list[str], tmp_path: Path) -> None:
    make_vision_model("llava").save_pretrained(tmp_path / "model")
    make_processor("llava").save_pretrained(tmp_path / "model")
    (tmp_path / "set").mkdir()
    Dataset.from_list(vision_rows(4)).to_parquet(tmp_path / "set" / "train.parquet")
    line = f"--dataset_name {tmp_path}/set --model_name_or_path {tmp_path}/model --per_device_train_batch_size 2 "
    line += "--gradient_accumulation_steps 2 --dataset_num_proc 1 --dtype bfloat16 --use_peft --lora_target_modules "
    targets = ["q_proj,", "v_proj"] if losses else ["all-linear"]
    words = ["train", *line.split(), *targets, *losses, *streaming, "--output_dir", str(tmp_path / "run")]
    words += SHORT.split()
    words[words.index("--max_length") + 1] = "256"
    assert main(words) == 0
    adapter = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert {"q_proj", "v_proj"} <= {name.rsplit(".")[-1] for name in adapter["target_modules"]}


def test_commas_between_names_are_no_part_of_them() -> None:
    for given in (["q_proj,", "v_proj"], ["q_proj,v_proj"], ["q_proj, v_proj,"]):
        assert ModelArguments(use_peft=True, lora_target_modules=given).lora_target_modules == ["q_proj", "v_proj"]
    pattern = r"layers\.\d{1,2}\..*"
    assert ModelArguments(use_peft=True, lora_target_modules=[pattern]).lora_target_modules == pattern


# Of the Alignment Handbook's recipes for DPO: the keys that are TRL's and transformers' now, and those that were.
STANDING = {
    "model_name_or_path": "MODEL",
    "attn_implementation": "sdpa",
    "trust_remote_code": False,
    "dataset_num_proc": 1,
    "bf16": False,
    "beta": 0.02,
    "do_train": True,
    "do_eval": True,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "gradient_accumulation_steps": 2,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "hub_model_id": "a-model",
    "hub_private_repo": True,
    "hub_strategy": "every_save",
    "learning_rate": 6.0e-7,
    "log_level": "info",
    "logging_strategy": "steps",
    "logging_steps": 5,
    "loss_type": "apo_zero",
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr_rate": 0.2},
    "max_grad_norm": 0.3,
    "max_length": 512,
    "num_train_epochs": 1,
    "optim": "rmsprop",
    "padding_free": True,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 3,
    "push_to_hub": False,
    "report_to": [],
    "run_name": "a-run",
    "save_strategy": "steps",
    "save_steps": 0.5,
    "save_total_limit": 1,
    "seed": 7,
    "use_peft": True,
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lora_target_modules": ["q_proj", "down_proj"],
}
ONCE = {
    "torch_dtype": None,
    "dataset_mixture": {
        "datasets": [{"id": "DATA/texts", "config": "default", "split": "train", "weight": 0.5}],
        "seed": 0,
    },
    "dataset_mixer": {"DATA/texts": 1.0},
    "dataset_splits": ["train", "test"],
    "max_prompt_length": 128,
    "hub_model_revision": "v1",
    "overwrite_output_dir": True,
    "warmup_ratio": 0.2,
}
NOW = {
    "dtype": "float32",
    "datasets": [{"path": "DATA/texts", "name": None, "split": "train", "columns": ["prompt", "chosen", "rejected"]}],
    "test_split_size": 4,
    "hub_revision": "v1",
    "warmup_steps": 0.2,
}


def test_files_of_the_handbook_run_with_what_is_advised(
    model: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "before.yaml").write_text(yaml.safe_dump(STANDING | ONCE), encoding="utf-8")
    assert main(["train", "--config", str(tmp_path / "before.yaml")]) == 2
    message = capsys.readouterr().err
    assert all(f"\n  {name}: " in message for name in ONCE)
    assert all(name in message for name in NOW) and not any(f"\n  {name}: " in message for name in STANDING)
    line = run(filled(STANDING | NOW, model, data), tmp_path / "run")
    said = capsys.readouterr()
    assert "--hub_model_id, --hub_private_repo, --hub_revision would have no effect without --push_to_hub" in said.err
    # The file's, where SHORT does not say otherwise.
    args = TrainParser().read(["--config", str(tmp_path / "run.yaml"), "--use_cpu"])[2]
    assert (args.beta, args.loss_type, args.optim, args.save_steps) == (0.02, ["apo_zero"], "rmsprop", 0.5)
    assert line["loss"] == pytest.approx(1.0, abs=1e-4)  # APO's, where policy and reference agree
    assert "packed rows" in said.out


def test_masks_are_left_out_of_what_ddp_sends(model: Path, data: Path, tmp_path: Path) -> None:
    values = {"model_name_or_path": str(model), "dataset_name": str(data / "texts"), "output_dir": str(tmp_path)}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values | {"ignore_bias_buffers": True, "use_cpu": True}))
    read = TrainParser().read(["--config", str(tmp_path / "run.yaml")])
    trainer = make_trainer(*read[:3])
    assert trainer.model._ddp_params_and_buffers_to_ignore == []  # of a Llama there are none
    layer = torch.nn.Linear(2, 2)
    layer.register_buffer("causal", torch.ones(2, 2, dtype=torch.bool))
    layer.register_buffer("frequencies", torch.ones(2))
    leave_out_masks(layer)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        sent = torch.nn.parallel.DistributedDataParallel(layer)
        assert sent.parameters_to_ignore == {"causal"} and len(sent.modules_buffers) == 1
    finally:
        torch.distributed.destroy_process_group()


def test_a_flag_of_scripts_that_would_do_nothing(model: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--model_name_or_path", str(model), "--dataset_name", str(data / "texts"), "--use_cpu"]
    for more, message in (
        (["--do_eval"], "--do_eval is given, but --eval_strategy is no"),
        (["--do_predict"], "--do_predict is given, but a training predicts nothing"),
        (
            ["--dataset_streaming", "--max_steps", "1", "--train_sampling_strategy", "sequential"],
            "give --dataset_shuffle_buffer 0",
        ),
    ):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err
