"""fastdpo info: what was built and is used here; with --check, whether it computes right on this machine's devices."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

    from fastdpo.logps.check_cases import Measured
    from fastdpo.logps.self_check import Outcome

_LEGEND = """\
Each figure is the largest error against float64 and, in percent, what it is of the most that rounding explains there;
extras are entropy, log_sum_sq_probs, mean_logits and the gap to the greatest other logit. Above 100 % is wrong."""
_COLUMNS = {
    "logps": ("logps",),
    "d hidden": ("grad hidden",),
    "d weight": ("grad weight",),
    "d bias": ("grad bias",),
    "extras": ("entropy", "log_sum_sq_probs", "mean_logits", "top_gap"),
}
_DTYPES = ("float32", "bfloat16", "float16", "float64")
# Cuts of the CUDA ops' work into tokens and entries, in the place of their own, which takes a check's calls whole.
_SMALL_BLOCKS = "64,128"


def run(argv: Sequence[str]) -> int:
    """Returns 0, or 1 where a check found something wrong."""
    parser = argparse.ArgumentParser(prog="fastdpo info", description="Print what was built, and against what.")
    parser.add_argument(
        "--check",
        action="store_true",
        help="compute small cases on every device, by every path that there is, and print how far the results are from "
        "float64: a table for a bug report",
    )
    args = parser.parse_args(argv)
    from fastdpo.logps.device_paths import build_info

    facts = dict(_lines(build_info()))
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")
    return _check() if args.check else 0


def _lines(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in facts.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}: {key}", str(one)) for key, one in value.items())
        else:
            yield name, ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


class _Row(NamedTuple):
    device: str
    path: str
    dtype: str
    outcome: Outcome


def _check() -> int:
    import torch

    print(f"\nPython {platform.python_version()}, {platform.platform()}, {torch.get_num_threads()} threads")
    for variable, value in sorted(os.environ.items()):
        if variable.startswith("FASTDPO_"):
            print(f"{variable}={value}")
    rows = []
    for device, name in _devices():
        print(f"{device}: {name}", flush=True)
        rows += list(_checks(device))
    print(f"\n{_table(rows)}\n\n{_LEGEND}")
    findings = [f"{row.device}, {row.path}, {row.dtype}: {row.outcome.finding}" for row in rows if row.outcome.finding]
    print("".join(f"\n{finding}\n" for finding in findings), end="")
    return int(bool(findings))


def _devices() -> Iterator[tuple[torch.device, str]]:
    """This machine's, and what is to be known of them."""
    import torch

    from fastdpo.logps.cuda_devices import driver
    from fastdpo.report.facts import device_name

    yield torch.device("cpu"), device_name(torch.device("cpu"))
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        return
    for index in range(torch.accelerator.device_count()):
        device = torch.device(accelerator.type, index)
        name = device_name(device)
        if device.type == "cuda" and torch.version.cuda is not None:
            capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
            name += f", compute capability {capability}, driver {driver()}"
        yield device, name


def _checks(device: torch.device) -> Iterator[_Row]:
    """Every path of the device, in every dtype."""
    import torch

    from fastdpo.logps import device_paths
    from fastdpo.logps.self_check import check

    for name in _DTYPES:
        dtype = getattr(torch, name)
        if name == "float64" and device.type == "mps":  # which has none
            continue
        if device.type == "cpu" and not device_paths.is_portable(device):
            yield _Row(str(device), "kernels", name, check(device_paths.kernels("CPU"), dtype, device))
        if device.type == "cuda" and device_paths.CUDA_GATE is not None:
            for level in _levels(device):
                with _environment(FASTDPO_CUDA_LEVEL=level):
                    yield _Row(str(device), f"Level {level}", name, device_paths.CUDA_GATE.check(device, dtype))
                    with _environment(FASTDPO_CUDA_BLOCKS=_SMALL_BLOCKS):
                        outcome = check(device_paths.kernels("CUDA"), dtype, device)
                    yield _Row(str(device), f"Level {level}, cut small", name, outcome)
        yield _Row(str(device), "portable", name, check(device_paths.PORTABLE_OPS, dtype, device))


def _levels(device: torch.device) -> tuple[str, ...]:
    import torch

    from fastdpo.logps.device_paths import build_info

    has_level1 = build_info()["cuda_level1"] == "built" and torch.cuda.get_device_capability(device) == (9, 0)
    return ("0", "1") if has_level1 else ("0",)


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _table(rows: Sequence[_Row]) -> str:
    lines = [["device", "path", "dtype", *_COLUMNS, "status"]]
    for row in rows:
        cells = [_cell([one for one in row.outcome.measured if one.output in names]) for names in _COLUMNS.values()]
        lines.append([row.device, row.path, row.dtype, *cells, _status(row.outcome)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _cell(measured: Sequence[Measured]) -> str:
    """The one that is nearest to its bound, or farthest beyond it."""
    if not measured:
        return "-"
    worst = max(measured, key=lambda one: one.excess)
    return f"{worst.error:.1e} {100 * worst.excess:.0f} %"


def _status(outcome: Outcome) -> str:
    if outcome.verdict is None:
        return "no memory"
    if outcome.verdict.passed:
        return "right"
    return "WRONG" if outcome.measured else "FAILED"
