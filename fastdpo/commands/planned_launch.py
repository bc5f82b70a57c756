"""What a run's flags of ``accelerate launch`` say of the devices that are planned for."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import yaml

from fastdpo.commands.launch_flags import LaunchFlags, config_file
from fastdpo.errors import UsageError, bad_input

# Flags that say where and when processes start, and nothing of what they hold.
_OF_NO_WEIGHT = {
    *("machine_rank", "num_machines", "main_process_ip", "main_process_port", "main_training_function", "gpu_ids"),
    *("rdzv_backend", "rdzv_conf", "same_network", "max_restarts", "monitor_interval", "role", "tee", "log_dir"),
    *("multi_gpu", "quiet", "enable_cpu_affinity", "debug"),
}


def settle_devices(flags: LaunchFlags, asked: argparse.Namespace) -> None:
    """Puts the number of processes and the engine of ``--num_processes`` and ``--accelerate_config`` in the place of
    ``--devices`` and ``--stage``, and the file's precision in that of ``--bf16`` and ``--fp16``, where these are not
    given themselves.

    Raises:
        UsageError: they ask for what is not planned for.
    """
    stage, count = None, asked.num_processes
    if asked.accelerate_config is not None:
        file = config_file(asked.accelerate_config)
        with bad_input(f"--accelerate_config {file}"):
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
            values = values if isinstance(values, dict) else {}
            stage, of_file = _read(values, asked.accelerate_config)
            count = of_file if count is None else count
            _settle_precision(values, asked)
    if others := [name for name in flags.names if name not in _OF_NO_WEIGHT]:
        raise UsageError(
            f"--{others[0]}: this setting of accelerate launch is not planned for. Leave it out, and say --devices and "
            "--stage."
        )
    if asked.devices is None:
        asked.devices = 1 if count is None else count
        if asked.devices == 1 and stage not in (None, "ddp"):
            raise UsageError(f"--accelerate_config {asked.accelerate_config}: over how many devices? Give --devices.")
    if asked.stage is None and asked.devices > 1:
        asked.stage = stage


def _read(values: Mapping[str, Any], name: str) -> tuple[str | None, int | None]:
    """The stage, and the number of processes, of accelerate's configuration; None for what it does not say.

    Raises:
        ValueError: an engine that is not planned for.
    """
    kind = str(values.get("distributed_type", "NO")).upper()
    count = values.get("num_processes")
    deepspeed, fsdp = values.get("deepspeed_config") or {}, values.get("fsdp_config") or {}
    if kind == "NO":
        return None, 1
    if kind in ("MULTI_GPU", "MULTI_CPU"):
        return "ddp", count
    if kind == "FSDP" and str(fsdp.get("fsdp_version", 1)) == "2" and not fsdp.get("fsdp_offload_params"):
        return "fsdp2", count
    offloads = any(str(deepspeed.get(f"offload_{what}_device", "none")) != "none" for what in ("optimizer", "param"))
    stages = {"1": "zero1", "2": "zero2", "3": "zero3"}
    stage = stages.get(str(deepspeed.get("zero_stage")))
    if kind == "DEEPSPEED" and stage is not None and not offloads:
        return stage, count
    raise ValueError(f"{name} is not planned for, which is DDP, ZeRO-1, 2 or 3, or FSDP2, without offloading")


def _settle_precision(values: Mapping[str, Any], asked: argparse.Namespace) -> None:
    """Raises ValueError for one that is not planned for."""
    precision = str(values.get("mixed_precision") or "no").lower()
    if precision in ("no", "false"):  # as YAML reads a bare "no"
        return
    if precision not in ("bf16", "fp16"):
        raise ValueError(f"mixed_precision is {precision}, which is not planned for; it should be no, bf16 or fp16")
    if asked.bf16 is None and not asked.fp16:
        setattr(asked, precision, True)
