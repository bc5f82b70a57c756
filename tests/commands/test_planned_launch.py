"""The devices and the stage that a run's flags of a launcher stand for."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from fastdpo.commands.launch_flags import LaunchFlags
from fastdpo.commands.planned_launch import settle_devices
from fastdpo.errors import UsageError


def settled(*words: str, **asked: Any) -> tuple[int, str | None]:
    names = ("num_processes", "accelerate_config", "devices", "stage", "bf16", "fp16")
    namespace, flags = argparse.Namespace(**dict.fromkeys(names) | asked), LaunchFlags()
    assert flags.take(words) == []
    settle_devices(flags, namespace)
    return namespace.devices, namespace.stage


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, (1, None)),
        ({"num_processes": 4}, (4, None)),
        ({"devices": 8, "stage": "zero3"}, (8, "zero3")),
        ({"num_processes": 4, "accelerate_config": "multi_gpu"}, (4, "ddp")),
        ({"num_processes": 4, "accelerate_config": "zero2"}, (4, "zero2")),
        ({"num_processes": 4, "accelerate_config": "fsdp2", "devices": 2, "stage": "zero1"}, (2, "zero1")),
        ({"accelerate_config": "zero3", "devices": 2}, (2, "zero3")),
        ({"accelerate_config": "single_gpu"}, (1, None)),
    ],
)
def test_a_run_is_planned_for_the_devices_that_it_is_for(asked: dict[str, Any], expected: tuple[int, str]) -> None:
    assert settled("--main_process_port", "29501", **asked) == expected


def test_a_file_of_accelerates_says_both(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("distributed_type: DEEPSPEED\nnum_processes: 3\ndeepspeed_config: {zero_stage: 2}\n")
    assert settled(accelerate_config=str(file)) == (3, "zero2")
    assert settled(accelerate_config=str(file), num_processes=5) == (5, "zero2")


@pytest.mark.parametrize(
    ("precision", "given", "expected"),
    [
        ("bf16", {}, (True, False)),
        ("fp16", {}, (None, True)),
        ("fp16", {"bf16": True}, (True, False)),
        ("bf16", {"bf16": False}, (False, False)),
        ("bf16", {"fp16": True}, (None, True)),
        (False, {}, (None, False)),  # how YAML reads no
        ("no", {"bf16": True}, (True, False)),
        (None, {}, (None, False)),
    ],
)
def test_the_files_precision_is_planned_for(
    precision: Any, given: dict[str, bool], expected: tuple[bool | None, bool], tmp_path: Path
) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(json.dumps({"distributed_type": "MULTI_GPU", "num_processes": 2, "mixed_precision": precision}))
    asked = argparse.Namespace(num_processes=None, accelerate_config=str(file), devices=None, stage=None)
    vars(asked).update({"bf16": None, "fp16": False} | given)
    settle_devices(LaunchFlags(), asked)
    assert (asked.bf16, asked.fp16, asked.devices) == (*expected, 2)


@pytest.mark.parametrize(
    ("launcher", "said"),
    [
        ({"distributed_type": "FSDP", "num_processes": 2}, "is not planned for, which is DDP"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": True}}, "without"),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3, "offload_param_device": "cpu"}},
            "with",
        ),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "a.json"}},
            "is not planned for",
        ),
        ({"distributed_type": "MULTI_GPU", "num_processes": 2, "mixed_precision": "fp8"}, "mixed_precision is fp8"),
        ({"distributed_type": "TPU", "num_processes": 2}, "is not planned for"),
        ({"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}}, "over how many devices"),
    ],
)
def test_launchers_that_are_not_planned_for(launcher: dict[str, Any], said: str, tmp_path: Path) -> None:
    file = tmp_path / "launcher.yaml"
    file.write_text(json.dumps(launcher))
    with pytest.raises(UsageError, match=said):
        settled(accelerate_config=str(file))


@pytest.mark.parametrize("words", [["--use_fsdp"], ["--zero_stage", "3"], ["--mixed_precision=bf16"]])
def test_what_decides_memory_is_refused_by_name(words: list[str]) -> None:
    with pytest.raises(UsageError, match=words[0].split("=")[0]):
        settled(*words, num_processes=2)
    with pytest.raises(UsageError, match="no such file"):
        settled(accelerate_config="nowhere")
