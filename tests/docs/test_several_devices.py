"""The launchers' lines and files of the page about several devices, as the launchers' own parsers read them."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from pages import GUIDES, blocks, text_of
from torch.distributed.run import get_args_parser

from fastdpo.commands.flags import TrainParser

PAGE = GUIDES / "several-devices.md"
PARSERS = {"torchrun": get_args_parser, "accelerate": launch_command_parser}


def scripts() -> list[str]:
    """What shells read: consoles, the job script, and the SkyPilot file's commands."""
    return [*blocks(PAGE, "console"), *blocks(PAGE, "bash"), *(file["run"] for file in files("run"))]


def files(key: str) -> list[dict[str, object]]:
    """The YAML files of the page that have the key."""
    return [file for file in map(yaml.safe_load, blocks(PAGE, "yaml")) if key in file]


def launcher_lines() -> list[list[str]]:
    """The words of each launcher and after it; what a variable holds is some number."""
    text = re.sub(r"\$\w+", "2", "\n".join(scripts()).replace("\\\n", " "))
    lines = [shlex.split(line, comments=True) for line in text.splitlines() if "fastdpo" in line]
    return [line[i:] for line in lines for i, word in enumerate(line) if word in PARSERS]


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("words", launcher_lines(), ids=shlex.join)
def test_launchers_read_their_lines(words: list[str]) -> None:
    launcher, *words = words
    if launcher == "accelerate":
        assert words.pop(0) == "launch"
    asked = PARSERS[launcher]().parse_args(words)
    assert asked.module and asked.training_script == "fastdpo" and asked.training_script_args[0] == "train"
    _, unknown = TrainParser().parse_known_args(asked.training_script_args[1:])
    assert not unknown
    assert int(getattr(asked, "num_processes", None) or asked.__dict__.get("nproc_per_node") or 4) > 1


def test_every_launcher_is_shown() -> None:
    assert len([words for words in launcher_lines() if words[0] == "torchrun"]) == 4
    assert len([words for words in launcher_lines() if words[0] == "accelerate"]) == 3


@pytest.mark.parametrize("script", scripts())
def test_shells_take_the_scripts(script: str) -> None:
    assert subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True).stderr == ""


def test_accelerate_reads_its_files(tmp_path: Path) -> None:
    kinds = []
    for i, values in enumerate(files("distributed_type")):
        file = tmp_path / f"{i}.yaml"
        file.write_text(yaml.safe_dump(values), encoding="utf-8")
        loaded = load_config_from_file(str(file))  # raises for a key that it does not know
        kinds.append(loaded.distributed_type.value)
        known = {action.dest for action in launch_command_parser()._actions}
        for engine in ("fsdp_config", "deepspeed_config"):
            assert getattr(loaded, engine).keys() <= known
    assert kinds == ["MULTI_GPU", "FSDP", "DEEPSPEED"]


def test_the_job_of_skypilot_has_its_keys() -> None:
    (job,) = files("run")
    assert {"name", "num_nodes", "resources", "workdir", "setup", "run"} == job.keys()
    variables = set(re.findall(r"\$(SKYPILOT_\w+)", str(job["run"])))
    assert variables == {f"SKYPILOT_{name}" for name in ("NODE_IPS", "NUM_NODES", "NUM_GPUS_PER_NODE", "NODE_RANK")}


def test_the_job_script_hands_signals_on() -> None:
    (script,) = blocks(PAGE, "bash")
    assert "SIGUSR1" in script and "--signal=USR1" in script and "--resume_from_checkpoint auto" in script


def test_the_page_is_in_the_navigation() -> None:
    assert "guides/several-devices.md" in text_of(PAGE.parents[2] / "mkdocs.yml")
