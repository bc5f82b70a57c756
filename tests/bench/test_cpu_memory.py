"""The comparison of allocators: every way with every run, and what is said of one that fails."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cpu_memory
import pytest


def test_ways_are_compared_with_torchs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | int] = []

    def run_job(module: str, job: dict[str, Any], timeout: float) -> dict[str, Any]:
        asked.append(job["memory"])
        peak = 300 if job["memory"] == "torch" else 150
        runs = [{"peak_bytes": peak << 20, "cpu_seconds": [2.0, 4.0, 2.0]} for _ in job["cases"]]
        return {"results": [*runs[:-1], {"failed": "no memory"}]}

    monkeypatch.setattr(cpu_memory, "run_job", run_job)
    file = tmp_path / "figures.json"
    assert cpu_memory.main(["--ways", "torch", "128", "ours", "--repeats", "2", "--json", str(file)]) == 0
    assert asked == ["torch", 128 << 10, "ours"] * 2
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == 3 * len(cpu_memory.cases_of("llama-9m"))
    assert lines[0].split()[-4:] == ["x", "2.00", "1.00", "x"]
    assert lines[2].split()[-6:] == ["150", "0.50", "x", "2.00", "1.00", "x"] and "fastdpo's" in lines[2]
    assert lines[-1].split()[-4:] == ["failed", "-", "failed", "-"]
    assert len(json.loads(file.read_text())["runs"]["ours"]) == 2
