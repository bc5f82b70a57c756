"""fastdpo info: the facts, and the table of --check that goes into a bug report."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdpo.commands.cli import main
from fastdpo.logps import device_paths
from fastdpo.logps.check_cases import Ops
from fastdpo.logps.device_paths import PORTABLE_OPS, build_info

pytestmark = pytest.mark.skipif(
    torch.accelerator.is_available(), reason="the table has more rows than are counted here"
)


def rows_of(out: str) -> list[list[str]]:
    """The table's cells."""
    lines = out.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("device "))
    table = lines[first : lines.index("", first)]
    return [re.split(r"\s{2,}", line) for line in table]


def test_facts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"cpu_path {build_info()['cpu_path']}" in re.sub(" +", " ", out)
    assert re.search(r"^paths: cpu +kernels for ", out, re.M) and re.search(
        r"^cpu_products: float64 +at::mm", out, re.M
    )
    assert "device " not in out


def test_a_check_that_finds_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDPO_CUDA_BLOCKS", "64,64")
    assert main(["info", "--check"]) == 0
    out = capsys.readouterr().out
    header, *rows = rows_of(out)
    assert header == ["device", "path", "dtype", "logps", "d hidden", "d weight", "d bias", "extras", "status"]
    paths = {tuple(row[:3]) for row in rows}
    assert paths == {
        ("cpu", path, dtype)
        for path in ("kernels", "portable")
        for dtype in ("float32", "bfloat16", "float16", "float64")
    }
    for row in rows:
        assert row[-1] == "right" and all(re.fullmatch(r"\d\.\de[-+]\d\d \d+ %", cell) for cell in row[3:-1]), row
    assert torch.__version__ in out and "\nPython 3." in out
    assert "\nFASTDPO_CUDA_BLOCKS=64,64\n" in out and "Above 100 % is wrong." in out


def test_a_check_that_finds_something(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the kernels a wrong sum, in the portable path an error; float64 has no memory."""

    def wrong(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        grad_hidden, grad_weight, grad_bias = PORTABLE_OPS.backward(*args, **kwargs)
        return grad_hidden, grad_weight * 1.2, grad_bias

    def failing(hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        if hidden.dtype == torch.float64:
            raise torch.OutOfMemoryError("no room")
        raise ValueError("not today\nnor tomorrow")

    monkeypatch.setattr(device_paths, "kernels", lambda key: Ops(PORTABLE_OPS.forward, wrong))
    monkeypatch.setattr(device_paths, "PORTABLE_OPS", Ops(failing, PORTABLE_OPS.backward))
    assert main(["info", "--check"]) == 1
    out = capsys.readouterr().out
    for device, path, dtype, *cells, status in rows_of(out)[1:]:
        assert device == "cpu"
        if path == "kernels":
            assert status == "WRONG" and int(cells[2].split()[1]) > 100 and int(cells[0].split()[1]) <= 100
        else:
            assert status == ("no memory" if dtype == "float64" else "FAILED") and set(cells) == {"-"}
    assert "cpu, kernels, bfloat16: results are wrong (grad weight); worst is grad weight of the case '" in out
    assert "cpu, portable, float32: a small call failed with ValueError: not today\n" in out
    assert "portable, float64: " not in out


def test_without_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    with device_paths.portable_everywhere():
        assert main(["info", "--check"]) == 0
    assert {row[1] for row in rows_of(capsys.readouterr().out)[1:]} == {"portable"}


def test_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--help"]) == 0
    assert "a table for a bug report" in re.sub(r"\s+", " ", capsys.readouterr().out)
    assert main(["info", "--chek"]) == 2
    assert "unrecognized arguments: --chek" in capsys.readouterr().err
