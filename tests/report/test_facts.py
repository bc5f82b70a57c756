"""fastdpo.report.facts: commands and settings as they were, without secrets."""

from __future__ import annotations

import shlex

import pytest
import torch

from fastdpo.commands.flags import TrainParser
from fastdpo.report.facts import all_settings, changed_settings, command_line, environment
from fastdpo.report.recorder import resume_command


@pytest.mark.parametrize("flag", ["--hub_token", "--hub-token", "--push_to_hub_token"])
def test_access_tokens_are_hidden(flag: str) -> None:
    for words in ([flag, "hf_secret"], [f"{flag}=hf_secret"]):
        line = command_line(["--beta", "0.5", *words, "--output_dir", "a b"])
        assert "hf_secret" not in line and "hidden" in line
        assert shlex.split(line)[:4] == ["fastdpo", "train", "--beta", "0.5"]
        assert line.endswith("--output_dir 'a b'")
    assert "pad" in command_line(["--pad_token", "pad"])


def test_settings_are_those_asked_for_and_tokens_are_hidden() -> None:
    parser = TrainParser()
    arguments = parser.read(["--beta", "0.5", "--hub_token", "hf_secret", "--use_cpu", "--save_steps", "500"])
    changed = changed_settings(parser.asked)
    assert changed == {"beta": (0.5, 0.1), "hub_token": ("(hidden)", None), "use_cpu": (True, False)}
    settings = all_settings(arguments)
    assert (settings["beta"], settings["hub_token"], settings["save_steps"]) == (0.5, "(hidden)", 500)
    assert "hf_secret" not in repr(settings)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--beta", "1"], "fastdpo train --beta 1 --resume_from_checkpoint last"),
        (["--resume_from_checkpoint", "x", "--beta=1"], "fastdpo train --beta=1 --resume_from_checkpoint last"),
        (["--resume-from-checkpoint=x"], "fastdpo train --resume_from_checkpoint last"),
    ],
)
def test_how_to_go_on(words: list[str], expected: str) -> None:
    assert resume_command(words) == expected


def test_the_environment_names_versions_and_kernels() -> None:
    facts = environment(torch.device("cpu"), processes=2)
    assert facts["torch"] == torch.__version__ and facts["processes"] == "2"
    assert facts["device"].startswith("CPU (") and "build: cpu_path" in facts
    assert all(isinstance(value, str) for value in facts.values())
