"""The command line, end to end on a tiny random model, and every way in which its input can be wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import signal
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from made_checkpoints import make_checkpoint
from safetensors.torch import load_file
from toy_data import make_tokenizer, text_rows, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fastdpo.commands import train as train_command
from fastdpo.commands.cli import main
from fastdpo.commands.flags import TrainParser
from fastdpo.errors import UsageError
from fastdpo.report.snapshot import Snapshot
from fastdpo.trainer.checkpoints import came_from, find_checkpoints, is_end, set_aside

STEPS = 8
# Dies as a machine does: no handler runs, nothing is flushed.
KILLED_AT_STEP_6 = """
import os, signal, sys
from fastdpo.commands import cli
from fastdpo.commands import train as train_command

class Killed(train_command.GentleStop):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)

train_command.GentleStop = Killed
sys.exit(cli.main(sys.argv[1:]))
"""


pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, tokenizer = tmp_path_factory.mktemp("model"), make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen good rows, and one each of: empty completion, identical pair, prompt that is too long."""
    rows = text_rows(19)
    rows[16]["rejected"] = ""
    rows[17]["rejected"] = rows[17]["chosen"]
    rows[18]["prompt"] = "again and " * 100
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


def train_words(model: Path, pairs: Path, output_dir: Path, *more: str) -> list[str]:
    flags = {
        "model_name_or_path": model,
        "dataset_name": pairs,
        "output_dir": output_dir,
        "max_steps": STEPS,
        "max_length": 128,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_steps": 4,
        "learning_rate": 1e-3,
        "use_cpu": True,
        # By number, for what is looked at otherwise depends on the machine's speed.
        "report_pairs": 8,
        "report_samples": 4,
        "report_max_new_tokens": 8,
    }
    return ["train", *(word for name, value in flags.items() for word in (f"--{name}", str(value))), *more]


def losses(output_dir: Path) -> dict[int, float]:
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


# --------------------------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A run from start to end, in a process of its own."""
    output_dir = tmp_path_factory.mktemp("runs") / "unbroken"
    done = processes.run(processes.MAIN, *train_words(model, pairs, output_dir), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return output_dir, done


def test_a_run_starts_at_ln2_and_logs_what_dpo_users_look_at(unbroken: tuple[Path, Any]) -> None:
    output_dir, _ = unbroken
    assert losses(output_dir)[1] == pytest.approx(math.log(2), abs=1e-3)
    assert sorted(losses(output_dir)) == list(range(1, STEPS + 1))
    history = json.loads((output_dir / "trainer_state.json").read_text())["log_history"]
    assert {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")} <= history[0].keys()
    assert {"logps/chosen", "logps/rejected", "grad_norm", "learning_rate"} <= history[0].keys()
    assert json.loads((output_dir / "train_results.json").read_text())["train_loss"] == pytest.approx(
        sum(losses(output_dir).values()) / STEPS, rel=1e-3
    )


def test_a_run_leaves_model_tokenizer_and_picture(unbroken: tuple[Path, Any], model: Path) -> None:
    output_dir, done = unbroken
    trained = AutoModelForCausalLM.from_pretrained(output_dir).state_dict()
    start = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert any(not torch.equal(trained[name], start[name]) for name in start)
    assert AutoTokenizer.from_pretrained(output_dir)("The sky")["input_ids"] == make_tokenizer()("The sky")["input_ids"]
    assert (output_dir / "training.png").read_bytes().startswith(b"\x89PNG")
    for name in ("training.png", "report.html", "README.md", "trainer_state.json", "train_results.json"):
        assert str(output_dir / name) in done.stdout
        assert (output_dir / name).exists()


def test_the_report_of_a_run(unbroken: tuple[Path, Any], model: Path, pairs: Path) -> None:
    output_dir, done = unbroken
    page = (output_dir / "report.html").read_text(encoding="utf-8")
    assert f"finished · {STEPS} steps" in page and "not looked at" not in page and ": none, because" not in page
    assert "the training set, for there is no evaluation set" in page
    assert page.count("<h3>before</h3>") == page.count("<h3>after</h3>") == 4
    assert shlex.join(["fastdpo", *train_words(model, pairs, output_dir)]) in unescape(page)
    assert "learning_rate</code></td><td>0.001</td>" in page  # changed, and named so
    assert "<td><code>beta</code></td><td>0.1</td></tr>" in page  # in the fold alone
    # Its stderr is a pipe: nothing is drawn there, and lines tell the speed.
    assert " pairs/s  " in done.stdout and "  ETA " in done.stdout and "ETA" not in done.stderr


def test_a_run_says_what_became_of_the_rows(unbroken: tuple[Path, Any]) -> None:
    output_dir, done = unbroken
    summary = json.loads((output_dir / "data_summary.json").read_text())["train"]
    assert (summary["rows_in"], summary["rows_kept"]) == (19, 17)
    assert summary["dropped"] == {"empty_completion": 1, "prompt_too_long": 1}
    assert summary["warned"] == {"identical": 1}
    assert summary["first_rows"] == {"empty_completion": [16], "prompt_too_long": [18], "identical": [17]}
    for words in ("dropped: chosen or rejected is empty", "dropped: the prompt alone fills max_length", "row 18"):
        assert words in done.stdout
    assert "1 of 19 rows (first: 17): chosen and rejected are identical" in done.stderr


def test_a_run_says_once_how_pairs_are_laid_out(unbroken: tuple[Path, Any]) -> None:
    _, done = unbroken
    said = "Batches are laid out in packed rows, common beginnings once (attention: sdpa)."
    assert (done.stdout + done.stderr).count(said) == 1


def test_a_killed_run_resumes_to_the_same_losses(
    unbroken: tuple[Path, Any], model: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = train_words(model, pairs, tmp_path / "killed")
    killed = processes.run(KILLED_AT_STEP_6, *words, OMP_NUM_THREADS="1")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [path.name for path in find_checkpoints(tmp_path / "killed")] == ["checkpoint-4"]
    capsys.readouterr()
    assert main([*words, "--resume_from_checkpoint", "last"]) == 0
    said = capsys.readouterr().out
    assert f"Going on from {tmp_path / 'killed' / 'checkpoint-4'}" in said.replace("\n", "")
    # A run from the start would reach the same losses, too.
    assert [step for step in range(1, STEPS + 1) if f"step {step:>5}  loss" in said] == [5, 6, 7, 8]
    assert losses(tmp_path / "killed") == pytest.approx(losses(unbroken[0]), rel=1e-5)
    # To the last bit, although the unbroken run has looked at its policy before the first step, and this one has not.
    got, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "killed", unbroken[0]))
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)
    starts = [Snapshot.load(folder / "report_start.json") for folder in (tmp_path / "killed", unbroken[0])]
    assert dataclasses.replace(starts[0], seconds=starts[1].seconds) == starts[1]
    page = (tmp_path / "killed" / "report.html").read_text(encoding="utf-8")
    assert "Rewards at the start" in page and page.count("<h3>before</h3>") == 4 and "since step 4" in page


class InterruptedAtStep3(train_command.GentleStop):
    presses = 1

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            for _ in range(self.presses):
                os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_saves_a_checkpoint_that_resumes_to_the_same_losses(
    unbroken: tuple[Path, Any],
    model: Path,
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = train_words(model, pairs, tmp_path / "run")
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(train_command, "GentleStop", InterruptedAtStep3)
        assert main(words) == 130
    assert signal.getsignal(signal.SIGINT) is before
    assert [path.name for path in find_checkpoints(tmp_path / "run")] == ["checkpoint-3"]
    assert (tmp_path / "run" / "training.png").exists()
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert f"stopped at step 3 of {STEPS}" in page and page.count("<h3>at the stop</h3>") == 4
    stderr = capsys.readouterr().err
    assert "Stopping after this step" in stderr
    assert "--resume_from_checkpoint last" in stderr
    assert main([*words, "--resume_from_checkpoint", "true"]) == 0
    assert "step     3  loss" not in capsys.readouterr().out
    assert losses(tmp_path / "run") == pytest.approx(losses(unbroken[0]), rel=1e-5)


def test_a_second_ctrl_c_stops_at_once(
    model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(InterruptedAtStep3, "presses", 2)
    monkeypatch.setattr(train_command, "GentleStop", InterruptedAtStep3)
    assert main(train_words(model, pairs, tmp_path / "run")) == 130
    assert "No checkpoint had been written" in capsys.readouterr().err
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "At the stop: not looked at." in page and "Rewards at the start" in page
    assert not find_checkpoints(tmp_path / "run")


def test_lora_with_evaluation_from_a_file_of_flags(
    model: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        "use_peft: true\nlora_r: 2\nlora_target_modules: [q_proj, v_proj]\nmax_steps: 100\nlearning_rate: 1e-2\n"
        "dataset_train_split: 'train[:12]'\ndataset_test_split: 'train[12:16]'\neval_strategy: steps\neval_steps: 2\n"
    )
    words = train_words(model, pairs, tmp_path / "run")
    i = words.index("--learning_rate")
    del words[i : i + 2]
    words[words.index("--max_steps") + 1] = "2"
    assert main([*words, "--config", str(config)]) == 0
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    (evaluation,) = [entry for entry in history if "eval_loss" in entry]
    assert evaluation["step"] == 2 and "eval_rewards/margins" in evaluation
    assert history[0]["learning_rate"] == pytest.approx(1e-2)
    adapter = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert adapter["r"] == 2 and sorted(adapter["target_modules"]) == ["q_proj", "v_proj"]
    summaries = json.loads((tmp_path / "run" / "data_summary.json").read_text())
    assert {name: summary["rows_in"] for name, summary in summaries.items()} == {"train": 12, "eval": 4}
    assert "adapter and tokenizer" in capsys.readouterr().out
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "of 4 pairs of the evaluation set, which is not trained on" in page
    assert "AutoPeftModelForCausalLM" in (tmp_path / "run" / "README.md").read_text(encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints of earlier runs
# --------------------------------------------------------------------------------------------------------------------


def make_checkpoints(folder: Path, whole: list[int], broken: list[int]) -> None:
    for step in whole + broken:
        make_checkpoint(folder, step, manifest=step in whole)


def test_checkpoints_of_an_earlier_run_are_moved_and_never_overwritten(tmp_path: Path) -> None:
    assert set_aside(tmp_path) is None
    make_checkpoints(tmp_path, whole=[5], broken=[10])
    assert set_aside(tmp_path) == tmp_path / "previous-1"
    assert sorted(path.name for path in (tmp_path / "previous-1").iterdir()) == ["checkpoint-10", "checkpoint-5"]
    make_checkpoints(tmp_path, whole=[5], broken=[])
    (tmp_path / "report_start.json").write_text("of that run")
    assert set_aside(tmp_path) == tmp_path / "previous-2"
    assert not list(tmp_path.glob("checkpoint-*"))
    assert (tmp_path / "previous-2" / "report_start.json").read_text() == "of that run"


def test_a_run_over_an_earlier_one_says_so(
    model: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_checkpoints(tmp_path / "run", whole=[4], broken=[])
    words = train_words(model, pairs, tmp_path / "run")
    words[words.index("--max_steps") + 1] = "1"
    assert main(words) == 0
    said = capsys.readouterr().out.replace("\n", " ")
    assert "holds checkpoints of an earlier run" in said
    assert f"--resume_from_checkpoint {tmp_path / 'run' / 'previous-1' / 'checkpoint-4'}" in said
    assert said.index("holds checkpoints") < said.index("Done")
    assert find_checkpoints(tmp_path / "run" / "previous-1") == [tmp_path / "run" / "previous-1" / "checkpoint-4"]


def test_a_run_that_is_finished_is_left_as_it_is(
    model: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = train_words(model, pairs, tmp_path / "run")
    words[words.index("--max_steps") + 1] = "3"  # in the middle of an epoch
    assert main(words) == 0

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    before = contents()
    capsys.readouterr()
    assert main([*words, "--resume_from_checkpoint", "last"]) == 0
    said = capsys.readouterr().out.replace("\n", " ")
    assert f"Nothing to do: this run ends at {tmp_path / 'run' / 'checkpoint-3'}" in said
    assert contents() == before


def test_a_run_whose_results_were_not_written_makes_no_step_and_writes_them(
    model: Path, pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = train_words(model, pairs, tmp_path / "run")
    words[words.index("--max_steps") + 1] = "3"
    assert main(words) == 0
    expected = load_file(tmp_path / "run" / "model.safetensors")
    steps = [
        entry["step"] for entry in json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    ]
    for path in (tmp_path / "run").iterdir():  # as if killed after the last checkpoint
        if path.is_file() and path.name != "report_start.json":
            path.unlink()
    assert main([*words, "--resume_from_checkpoint", "last"]) == 0
    assert "the checkpoint is of step 3, and the run ends at step 3" in caplog.text
    got = load_file(tmp_path / "run" / "model.safetensors")
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 3 and [entry["step"] for entry in state["log_history"]] == steps
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize(
    ("state", "length", "expected"),
    [
        ({"global_step": 9, "max_steps": 10, "epoch": 2.25}, {"max_steps": 10, "num_train_epochs": 3.0}, False),
        ({"global_step": 10, "max_steps": 10, "epoch": 2.5}, {"max_steps": 10, "num_train_epochs": 3.0}, True),
        ({"global_step": 10, "max_steps": 10, "epoch": 2.5}, {"max_steps": 12, "num_train_epochs": 1.0}, False),
        ({"global_step": 10, "max_steps": 10, "epoch": 2.5}, {"max_steps": -1, "num_train_epochs": 3.0}, False),
        ({"global_step": 12, "max_steps": 12, "epoch": 3.0}, {"max_steps": -1, "num_train_epochs": 3.0}, True),
        ({"global_step": 8, "max_steps": 12, "epoch": 2.0}, {"max_steps": -1, "num_train_epochs": 2.0}, False),
        ({}, {"max_steps": 1, "num_train_epochs": 3.0}, False),
    ],
)
def test_where_a_run_ends(state: dict[str, Any], length: dict[str, Any], expected: bool, tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert is_end(tmp_path, **length) is expected


def test_results_of_another_run_are_told_apart(tmp_path: Path) -> None:
    for name, history in {"run": [1, 2, 3], "mine": [1, 2], "other": [1, 4], "empty": []}.items():
        (tmp_path / name).mkdir()
        text = json.dumps({"log_history": [{"loss": value} for value in history]})
        (tmp_path / name / "trainer_state.json").write_text(text)
    found = {name: came_from(tmp_path / "run", tmp_path / name) for name in ("mine", "other", "empty", "nowhere")}
    assert found == {"mine": True, "other": False, "empty": False, "nowhere": False}


def test_one_target_module_is_a_name_unless_it_is_a_pattern(model: Path, pairs: Path, tmp_path: Path) -> None:
    words = [*train_words(model, pairs, tmp_path / "run"), "--use_peft", "--lora_target_modules"]
    words[words.index("--max_steps") + 1] = "1"
    for given, kept in (("q_proj", ["q_proj"]), ("self_attn.q_proj", ["self_attn.q_proj"])):
        assert main([*words, given]) == 0
        assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["target_modules"] == kept
    for given in ("all-linear", r".*\.q_proj", "(q|v)_proj"):
        assert TrainParser().read(["--use_peft", "--lora_target_modules", given])[1].lora_target_modules == given


# --------------------------------------------------------------------------------------------------------------------
# Bad input
# --------------------------------------------------------------------------------------------------------------------


def refuse(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail with exit code 2 and a short message; return the message."""
    assert main(words) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line]
    start = next(i for i, line in enumerate(errors) if line.startswith("fastdpo train: error: "))
    assert len(errors) - start <= 2, errors
    assert not any("Traceback" in line for line in errors)
    return errors[start]


GOOD = json.dumps(text_rows(1)[0])


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (f"{GOOD}\n{GOOD}\n{{broken\n", "pairs.jsonl, line 3: not valid JSON"),
        ('{"prompt": "p", "picked": "c"}\n', "missing columns 'chosen', 'rejected'; found 'prompt', 'picked'"),
        ("", "pairs.jsonl is empty"),
        ('{"prompt": "p", "chosen": "", "rejected": "x"}\n', "No row is left of 1. 1 dropped because chosen or"),
        ('{"prompt": "p", "chosen": 1, "rejected": 2}\n', "column 'chosen' has type"),
    ],
)
def test_bad_pairs(
    content: str, expected: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(content)
    assert expected in refuse(train_words(model, path, tmp_path / "run"), capsys)
    assert not list(tmp_path.glob("run/checkpoint-*"))


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--betta", "0.2"], "unknown flag --betta. Did you mean --beta?"),
        (["--learning-rat=1"], "unknown flag --learning-rat. Did you mean --learning_rate?"),
        (["loose"], "unexpected 'loose'"),
        (["--beta", "strong"], "argument --beta: invalid float value: 'strong'"),
        (["--loss_type", "sigmoidal"], "sigmoidal"),
        (["--truncation_mode", "keep"], "invalid choice: 'keep'"),
        (["--max_length", "1"], "max_length must be at least 2"),
        (["--dataset_name", "no/such/pairs.jsonl"], "No such file or folder: no/such/pairs.jsonl"),
        (["--dataset_name", ""], "--dataset_name is needed"),
        (["--model_name_or_path", ""], "--model_name_or_path is needed"),
        (["--model_name_or_path", "./nowhere"], "--model_name_or_path ./nowhere: no such folder"),
        (["--eval_strategy", "steps"], 'nknown split "test"'),
        (["--lora_r", "4"], "lora_r would have no effect without use_peft"),
        (["--resume_from_checkpoint", "last"], "no whole checkpoint in"),
        (["--resume_from_checkpoint", "nowhere"], "nowhere is not a checkpoint"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: "),
        (["--report_samples", "-1"], "report_samples is -1; it should be at least 0"),
        (["--max_length", "8"], "dropped because the prompt alone fills max_length (max_length is 8)"),
    ],
)
def test_bad_flags(
    more: list[str], expected: str, model: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in refuse(train_words(model, pairs, tmp_path / "run", *more), capsys)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("betta: 0.2", "unknown key 'betta'. Did you mean beta?"),
        ("config: other.yaml", "config is for the command line; leave it out of the file"),
        ("beta: null", "beta: null is no value for it; leave it out, or give one"),
        ("seed: null", "seed: null is no value for it"),
        ("beta: strong", "argument --beta: invalid float value: 'strong'"),
        ("truncation_mode: keep", "invalid choice: 'keep'"),
        ("beta: [0.1", "line 1: not valid YAML"),
        ("beta: 2001-99-99", "a value cannot be read (month must be in 1..12)"),
        ("beta: !!int x", "a value cannot be read ("),
        ("beta: !!bool x", "a value cannot be read ("),
        ("beta: !!timestamp x", "a value cannot be read ("),
        (f"beta: {'[' * 3000}", "a value cannot be read ("),
        ("model_init_kwargs: {a: 2001-01-01}", "model_init_kwargs: a value that JSON has no form for"),
        ("model_init_kwargs: &a {b: *a}", "model_init_kwargs: a value that JSON has no form for"),
        ("env: [A, B]", "env should be a mapping of names to values"),
        ('env: {"A=B": 1}', "run.yaml, env: "),
        ('env: {A: "a\\0b"}', "run.yaml, env: embedded null byte"),
        ("- beta", "needed a mapping of flags to values, found list"),
    ],
)
def test_bad_yaml(content: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(content)
    message = refuse(["train", "--config", str(tmp_path / "run.yaml")], capsys)
    assert expected in message and "run.yaml" in message


def test_yaml_values_are_defaults_and_the_command_line_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANOTHER_ONE", "old")
    config = tmp_path / "run.yaml"
    config.write_text(
        "beta: 0.5\nlearning_rate: 1e-5\nmax_length: null\ngradient_checkpointing: false\nuse_peft: yes\n"
        "lora_target_modules: [q_proj]\nmodel_init_kwargs: {a: 1}\nlr_scheduler_type: cosine\nuse_cpu: true\n"
        "env: {ANOTHER_ONE: new}\n"
    )
    _, model_args, args, _ = TrainParser().read(["--config", str(config), "--beta", "0.25", "--no_disable_dropout"])
    assert (args.beta, args.learning_rate, args.max_length) == (0.25, 1e-5, None)
    assert (args.gradient_checkpointing, args.disable_dropout, args.logging_first_step) == (False, False, True)
    assert TrainParser().read(["--no_logging_first_step"])[2].logging_first_step is False
    assert args.lr_scheduler_type == "cosine"
    assert args.model_init_kwargs == {"a": 1}
    assert model_args.use_peft is True
    assert model_args.lora_target_modules == ["q_proj"]
    assert os.environ["ANOTHER_ONE"] == "new"


def test_words_that_yaml_takes_for_others(tmp_path: Path) -> None:
    """Its ``no`` is false, and its 1e-7 a word."""
    config = tmp_path / "run.yaml"
    config.write_text(
        "eval_strategy: no\nsave_strategy: off\nuse_cpu: true\nuse_peft: no\nlearning_rate: 1e-6\n"
        "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-7, name: 1e}\n"
        "max_length: null\n"
    )
    _, model_args, args, _ = TrainParser().read(["--config", str(config)])
    assert (args.eval_strategy, args.save_strategy, model_args.use_peft) == ("no", "no", False)
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-7, "name": "1e"}
    assert args.max_length is None


def test_no_limit_can_be_said_on_the_command_line() -> None:
    assert TrainParser().read(["--use_cpu", "--max_length", "None"])[2].max_length is None
    with pytest.raises(UsageError, match="--max-length: invalid int value: 'ten'"):
        TrainParser().read(["--max_length", "ten"])


def test_a_flag_that_is_not_json_is_named() -> None:
    with pytest.raises(UsageError, match=r"--gradient_checkpointing_kwargs: no valid JSON .*'use_reentrant'"):
        TrainParser().read(["--use_cpu", "--gradient_checkpointing_kwargs", "{'use_reentrant': False}"])


def test_flags_of_trl_mean_the_same() -> None:
    """What TRL's parser makes of a command line for `trl dpo`, ours makes of it, too."""
    from trl import DPOConfig, ModelConfig, ScriptArguments, TrlParser

    line = (
        "--model_name_or_path m --model_revision r --dtype bfloat16 --attn_implementation eager --use_peft --lora_r 8 "
        "--lora_alpha 4 --lora_dropout 0.1 --lora_target_modules all-linear --use_rslora --dataset_name d "
        "--dataset_config c --dataset_train_split a --dataset_test_split b --beta 0.3 --max_length 77 "
        "--truncation_mode keep_start --learning_rate 2e-6 --per-device-train-batch-size 3 --use_cpu --bf16 false "
        "--eval_strategy steps --eval_steps 5 --output_dir o --gradient_accumulation_steps 4 --disable_dropout false"
    )
    words = shlex.split(line)
    theirs = TrlParser((ScriptArguments, ModelConfig, DPOConfig)).parse_args_and_config(words)
    ours = TrainParser().read(words)
    names = {word.lstrip("-").replace("-", "_") for word in words if word.startswith("--")}
    compared = 0
    for mine, his in zip(ours, theirs, strict=False):
        for name in names & vars(mine).keys() & vars(his).keys():
            assert getattr(mine, name) == getattr(his, name), name
            compared += 1
    assert compared == len(names)


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_tracebacks_on_request(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "variable":
        monkeypatch.setenv("FASTDPO_TRACEBACK", "1")
    with pytest.raises(UsageError, match="--dataset_name is needed"):
        main([*(["--debug"] if how == "flag" else []), "train"])


def test_errors_of_the_program_itself_are_not_hidden(
    model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("a fault in the loop")

    monkeypatch.setattr(train_command.DPOTrainer, "training_step", broken)
    with pytest.raises(ValueError, match="a fault in the loop"):
        main(train_words(model, pairs, tmp_path / "run"))


# --------------------------------------------------------------------------------------------------------------------
# The command itself
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "expected"), [("cpu", [True]), ("cuda", [])])
def test_on_a_cpu_memory_is_taken_from_our_allocator_before_a_model_is_loaded(
    device: str,
    expected: list[bool],
    model: Path,
    pairs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[bool] = []

    def stop_here(*_: Any) -> None:
        assert taken == expected
        raise UsageError("it comes to loading")

    monkeypatch.setattr(train_command, "use_tensor_memory", lambda: taken.append(True))
    monkeypatch.setattr(train_command, "make_trainer", stop_here)
    found = train_command.DPOConfig.device.fget  # which also sets up what else the arguments know of the machine
    monkeypatch.setattr(train_command.DPOConfig, "device", property(lambda args: found(args) and torch.device(device)))
    assert main(train_words(model, pairs, tmp_path / "run")) == 2 and taken == expected


def test_help_does_not_wait_for_transformers() -> None:
    code = (
        "import sys; from fastdpo.commands.cli import main; code = main(['--help']); "
        "print('transformers' in sys.modules, code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1] == "False 0", done.stderr
    assert "train a model on preference pairs" in done.stdout


def test_version_info_and_unknown_commands(capsys: pytest.CaptureFixture[str]) -> None:
    from fastdpo import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastdpo {__version__}\n"
    assert main(["info"]) == 0
    assert "cpu_path" in capsys.readouterr().out
    assert main(["info", "--help"]) == 0
    assert "Print what was built" in capsys.readouterr().out
    assert main(["trian"]) == 2
    assert "invalid choice: 'trian'" in capsys.readouterr().err
    assert main([]) == 2


def test_train_help_is_grouped_and_names_every_flag(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["train", "--help"]) == 0
    short = capsys.readouterr().out
    groups = [line for line in short.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert groups[:7] == ["general:", "model:", "pairs:", "DPO:", "LoRA:", "QLoRA:", "training:"]
    assert short.index("examples:") > short.index("--resume_from_checkpoint")
    assert main(["train", "--help_all"]) == 0
    full = capsys.readouterr().out
    for action in TrainParser()._actions:
        assert f"--{action.dest}" in full
        assert f"--{action.dest}" in short or f"--{action.dest}" in short.replace("\n  ", " ")


def test_demo_is_passed_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    demo = SimpleNamespace(main=lambda argv: len(argv))
    monkeypatch.setitem(sys.modules, "fastdpo.demo", demo)
    assert main(["demo", "--steps", "3", "--help"]) == 3
