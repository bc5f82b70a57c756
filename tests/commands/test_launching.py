"""Flags of ``accelerate launch`` among those of a training: what it is called with, and that the run is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from toy_data import text_rows, write_jsonl
from trl.cli.accelerate_config import resolve_accelerate_config_argument

from fastdpo.commands import launch_flags
from fastdpo.commands.cli import main
from fastdpo.commands.flags import TrainParser
from fastdpo.commands.launch_flags import profiles
from fastdpo.commands.launching import typed_words
from fastdpo.report.launcher import LAUNCHED

PROFILES = Path(launch_flags.__file__).with_name("profiles")


class Replaced(BaseException):
    """The process would be another one now."""


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The words that a process is replaced with; no settings of accelerate's on this machine."""
    words: list[str] = []

    def execv(program: str, given: list[str]) -> None:
        assert program == sys.executable == given[0]
        words.extend(given[1:])
        raise Replaced

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(launch_flags, "default_config_file", str(tmp_path / "none.yaml"))
    for name in ("LOCAL_RANK", "ACCELERATE_MIXED_PRECISION", LAUNCHED):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(LAUNCHED, "")  # so that it is as it was afterwards
    monkeypatch.delenv(LAUNCHED)
    return words


def launch(words: list[str], launched: list[str], command: str = "train") -> Any:
    """What accelerate makes of what it is called with for these words of ours."""
    launched.clear()
    with pytest.raises(Replaced):
        main([command, *words])
    assert launched[:2] == ["-m", "accelerate.commands.launch"] and os.environ.pop(LAUNCHED) == "1"
    asked = launch_command_parser().parse_args(launched[2:])
    assert asked.module and asked.training_script == "fastdpo"
    assert asked.training_script_args == [command, *words]  # which it reads once more, and hands on when it is resumed
    return asked


@pytest.mark.parametrize("command", ["train", "cache-ref"])
def test_processes_are_started_for_a_flag(command: str, launched: list[str]) -> None:
    asked = launch(["--num_processes", "2", "--beta", "0.2"], launched, command)
    assert (asked.num_processes, asked.multi_gpu, asked.config_file) == (2, True, None)


def test_and_for_a_key_of_a_file(launched: list[str], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "num_processes: 4\nmixed_precision: bf16\nuse_fsdp: true\nfsdp_version: 2\nfsdp_offload_params: true\n"
    )
    asked = launch(["--config", str(file), "--num_processes=3", "--gpu-ids", "0,1,2"], launched)
    assert (asked.num_processes, asked.mixed_precision, asked.gpu_ids) == (3, "bf16", "0,1,2")
    assert (asked.use_fsdp, asked.fsdp_version, asked.fsdp_offload_params, asked.multi_gpu) == (
        True,
        "2",
        "true",
        False,
    )


def test_one_process_needs_no_engine(launched: list[str]) -> None:
    asked = launch(["--num_processes", "1"], launched)
    assert (asked.num_processes, asked.multi_gpu) == (1, False)


def test_settings_of_the_machine_come_first(launched: list[str], tmp_path: Path) -> None:
    (tmp_path / "none.yaml").touch()
    assert not launch(["--num_processes", "2"], launched).multi_gpu


def test_trls_names_of_settings_are_known(launched: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import trl

    theirs = {path.stem for path in (Path(trl.__file__).parent / "accelerate_configs").glob("*.yaml")}
    assert set(profiles()) == theirs
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 6)
    for name in profiles():
        asked = launch(["--accelerate_config", name], launched)
        assert asked.num_processes == (None if name == "single_gpu" else 6)
        ours, his = (
            load_config_from_file(asked.config_file),
            load_config_from_file(str(resolve_accelerate_config_argument(["--accelerate_config", name])[1])),
        )
        assert ours.distributed_type == his.distributed_type and ours.num_machines == his.num_machines
        # Ours says nothing that his does not, but for leaving precision and number of processes to the run.
        for engine in ("fsdp_config", "deepspeed_config"):
            said = getattr(ours, engine)
            assert (
                said.items()
                <= getattr(his, engine).items()
                | {"offload_optimizer_device": "none", "offload_param_device": "none"}.items()
            )
    file = tmp_path / "mine.yaml"
    file.write_text((PROFILES / "fsdp2.yaml").read_text() + "num_processes: 2\n")
    asked = launch(["--accelerate_config", str(file)], launched)
    assert (asked.config_file, asked.num_processes) == (str(file), None)


def test_what_cannot_be_started(launched: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert main(["train", "--accelerate_config", "fsdp3"]) == 2
    assert "--accelerate_config fsdp3: no such file, and none of fsdp1, fsdp2, " in capsys.readouterr().err
    assert main(["train", "--num_processes", "0"]) == 2
    assert "num_processes is 0; it should be at least 1" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["train", "--num_processes", "2"]) == 2
    assert "num_processes is for starting processes, and this is one that accelerate launch" in capsys.readouterr().err
    assert not launched


def test_a_process_that_was_started_reads_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LAUNCHED, "1")
    parser = TrainParser()
    args = parser.read(["--num_processes", "2", "--use_fsdp", "--beta", "0.3", "--use_cpu"])[2]
    assert args.beta == 0.3 and not {"num_processes", "accelerate_config"} & parser.asked.keys()


def test_the_rank_that_deepspeeds_launcher_puts_first_is_no_word_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train", "--beta", "0.5"]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert typed_words(["--local_rank=1", *words]) == typed_words(["--local-rank=1", *words]) == words
    assert typed_words(words) == words and typed_words([]) == []
    for other in ("--local_rank=0", "--local_rank"):  # nobody's
        assert typed_words([other, *words]) == [other, *words]
    monkeypatch.delenv("LOCAL_RANK")
    assert typed_words(["--local_rank=1", *words]) == ["--local_rank=1", *words]


def test_an_evaluation_and_a_plan_start_none(capsys: pytest.CaptureFixture[str], launched: list[str]) -> None:
    """The flags of a training change nothing there."""
    assert main(["eval", "--num_processes", "2", "--model", "nowhere", "--use_cpu"]) == 2
    assert "num_processes" not in capsys.readouterr().err and not launched
    assert main(["plan", "--num_processes", "2", "--model_name_or_path", "./nowhere", "--use_cpu"]) == 2
    assert "num_processes" not in capsys.readouterr().err and not launched


@pytest.mark.slow
@pytest.mark.parametrize("how", ["file", "accelerate launch", "torchrun"])
def test_two_processes_have_the_steps_of_one(how: str, model: Path, tmp_path: Path) -> None:
    """As they are typed, on the CPU: a step of 2 × 2 pairs is one of 4, in the same order."""
    write_jsonl(tmp_path / "pairs.jsonl", text_rows(16))
    values = {
        "model_name_or_path": str(model),
        "dataset_name": str(tmp_path / "pairs.jsonl"),
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "max_length": 64,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "report_pairs": 0,
        "report_samples": 0,
        "train_sampling_strategy": "sequential",
    }
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    env = {name: value for name, value in env.items() if name not in ("LOCAL_RANK", LAUNCHED)}
    port = str(20_000 + os.getpid() % 20_000)

    def run(words: list[str], name: str, size: int, **more: Any) -> list[dict[str, Any]]:
        folder = tmp_path / name
        file = folder.with_suffix(".yaml")
        file.write_text(yaml.safe_dump({**values, **more, "per_device_train_batch_size": size}), encoding="utf-8")
        command = [sys.executable, *words, "train", "--config", str(file), "--output_dir", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
        assert done.returncode == 0, done.stderr
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        return [entry for entry in history if "loss" in entry]

    starters = {
        "file": ["-m", "fastdpo"],
        "accelerate launch": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
        + ["--main_process_port", port, "-m", "fastdpo"],
        "torchrun": ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port, "-m", "fastdpo"],
    }
    more = {"num_processes": 2, "main_process_port": int(port)} if how == "file" else {}
    one, two = run(["-m", "fastdpo"], "one", 4), run(starters[how], "two", 2, **more)
    assert len(one) == len(two) == 4
    for name in ("loss", "grad_norm", "rewards/margins"):
        assert [entry[name] for entry in two] == pytest.approx([entry[name] for entry in one], rel=1e-5, abs=1e-6), name
