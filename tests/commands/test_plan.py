"""``fastdpo plan``: what it says, in a table and as JSON, and the command that it hands out."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make_model
from toy_data import make_tokenizer, text_rows, write_jsonl

from fastdpo.commands.cli import main
from fastdpo.commands.flags import TrainParser
from fastdpo.commands.launching import LAUNCHED, LaunchAskedError
from fastdpo.plan.tracker import PARTS

# After it there is little else to be tried, which takes time.
QLORA = ("--use_peft", "--load_in_4bit")

pytestmark = pytest.mark.usefixtures("quiet_and_uncached")


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder without its weights."""
    folder = tmp_path_factory.mktemp("model")
    make_model("llama").config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def plan(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, Any]:
    assert main(["plan", *words, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_plan_is_a_command_to_train_with(configuration: Path, tmp_path: Path, capsys) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", text_rows(12))
    words = ["--model_name_or_path", str(configuration), "--dataset_name", str(pairs), "--beta", "0.2"]
    found = plan(capsys, *words, "--device", "cpu", "--memory", "1GiB")
    assert found["layout"] == "shared" and found["pairs"].startswith("the 8 longest of ")
    first = found["answers"][0]
    assert first["method"] == "full" and first["gradient_checkpointing"] and first["reference"] == "model"
    assert first["fits"] and not first["measured"] and list(first["parts"]) == list(PARTS)
    assert sum(first["parts"].values()) == first["total"]
    methods = [answer["method"] for answer in found["answers"]]
    assert methods == sorted(methods, key=["full", "LoRA", "QLoRA (4 bits)"].index) and len(set(methods)) == 3
    program, command, *flags = shlex.split(found["command"])
    assert (program, command) == ("fastdpo", "train")
    script_args, _, args, _ = TrainParser().read(flags)
    assert script_args.dataset_name == str(pairs) and args.beta == 0.2


def test_what_does_not_fit_is_taken_in_parts_or_otherwise(configuration: Path, capsys) -> None:
    words = ["--model_name_or_path", str(configuration), "--length", "150+100", "--device", "cpu", *QLORA]
    roomy = plan(capsys, *words, "--memory", "1GiB", "--no_gradient_checkpointing")
    needed = roomy["answers"][0]["total"]
    tight = plan(capsys, *words, "--memory", f"{needed * 0.7 / 2**20}MiB", "--no_gradient_checkpointing")
    answer = tight["answers"][0]
    assert answer["fits"] and answer["max_tokens_per_batch"] < roomy["answers"][0]["tokens"]
    assert f"--max_tokens_per_batch {answer['max_tokens_per_batch']}" in tight["command"]
    assert "--no_gradient_checkpointing" in tight["command"] and "--length" not in tight["command"]
    nothing = plan(capsys, *words, "--memory", "0.01MiB", code=1)
    assert nothing["command"] is None and not any(answer["fits"] for answer in nothing["answers"])


def test_several_devices_are_told_how_to_start(configuration: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION", LAUNCHED):
        monkeypatch.delenv(name, raising=False)
    words = ["--model_name_or_path", str(configuration), "--length", "20", "--device", "cuda", "--reserve", "0GiB"]
    words += ["--max_length", "None"]
    found = plan(capsys, *words, "--memory", "80GB", "--devices", "4", "--stage", "fsdp2", "--use_peft")
    assert {answer["stage"] for answer in found["answers"]} == {"fsdp2"}
    flags = shlex.split(found["command"])[2:]
    with pytest.raises(LaunchAskedError) as asked:
        TrainParser().read(flags)
    assert asked.value.words[-2:] == ["--num_processes", "4"] and asked.value.words[1].endswith("fsdp2.yaml")
    monkeypatch.setenv(LAUNCHED, "1")
    script_args, _, args, _ = TrainParser().read([*flags, "--use_cpu"])
    assert script_args.dataset_name == "pairs.jsonl" and args.max_length is None


def test_a_loss_of_whole_batches_is_not_taken_in_parts(configuration: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model_name_or_path", str(configuration), "--length", "20+10", "--device", "cpu", *QLORA]
    found = plan(capsys, *words, "--loss_type", "aot", "--memory", "0.01MiB", code=1)
    assert {(answer["max_tokens_per_batch"], answer["tokens"]) for answer in found["answers"]} == {(None, 8 * 40)}


def test_processes_of_a_run_file_are_the_devices(configuration: Path, tmp_path: Path, capsys) -> None:
    run_file = tmp_path / "run.yaml"
    run_file.write_text("num_processes: 4\naccelerate_config: zero2\nmain_process_port: 29501\n")
    words = ["--config", str(run_file), "--model_name_or_path", str(configuration), "--length", "20", *QLORA]
    answers = plan(capsys, *words, "--device", "cuda", "--memory", "80GB")["answers"]
    assert {(answer["devices"], answer["stage"]) for answer in answers} == {(4, "zero2")}


def test_the_table_says_that_it_is_an_estimate(configuration: Path, capsys) -> None:
    words = ["--model_name_or_path", str(configuration), "--length", "64+32", "--device", "cuda", "--memory", "24GiB"]
    assert main(["plan", *words, *QLORA]) == 0
    said = capsys.readouterr()
    assert "pairs of 64 + 32 tokens, shared rows" in said.out and "Estimates: not measured." in said.out
    assert all(part in said.out for part in PARTS) and "\nfastdpo train --model_name_or_path" in said.out
    assert "QLoRA (4 bits), activations kept" in said.err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--length", "10"], "--memory is needed"),
        (["--memory", "2GiB"], "--dataset_name is needed"),
        (["--memory", "2GiB", "--length", "ten"], "length is 'ten'"),
        (["--memory", "2GiB", "--length", "10", "--optim", "galore_adamw"], "whose memory is not known here"),
        (["--memory", "2GiB", "--length", "10", "--optim", "lomo"], "changes a weight as soon as backward reaches it"),
        (["--memory", "2GiB", "--length", "10", "--device", "gpu"], "--device: 'gpu' is no kind of device"),
        (["--memory", "2GiB", "--length", "10", "--load_in_4bit"], "needs --use_peft"),
        (
            ["--memory", "2GiB", "--activation_offloading", "--device", "cpu"],
            "activation_offloading is on, which",
        ),
        (
            ["--memory", "2GiB", "--activation_offloading", "--devices", "2", "--stage", "zero2"],
            "activation_offloading is not supported with FSDP or DeepSpeed",
        ),
        (["--memory", "2GiB", "--length", "10", "--stage", "zero2"], "give --devices"),
        (["--memory", "2GiB", "--length", "10", "--use_fsdp"], "--use_fsdp: this setting of accelerate launch"),
        (
            ["--memory", "2GiB", "--length", "10", *QLORA, "--devices", "2", "--stage", "fsdp2"],
            "weights in 4 bits are not divided over devices",
        ),
        (["--memory", "0", "--length", "10"], "--memory 0 is none; it should be like 24GiB"),
        (["--memory", "2GiB", "--length", "600+800"], "above max_length, 1024"),
        (["--memory", "1GiB", "--length", "10"], "--reserve: 1.0 GiB are to be left free, of 1.0 GiB"),
        (["--memory", "some", "--length", "10"], "is no amount of memory"),
    ],
)
def test_input_that_is_refused(flags: list[str], said: str, configuration: Path, capsys) -> None:
    assert main(["plan", "--model_name_or_path", str(configuration), "--device", "cuda", *flags]) == 2
    assert said in capsys.readouterr().err
