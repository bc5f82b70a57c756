"""The comparison of estimates with measured peaks: what is run, and what is said of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import plan
import pytest
from end_to_end.planned import PlanCase

SMALL = [PlanCase("llama-small", pairs=2, prompt=20, completion=10)]
SMALL.append(replace(SMALL[0], layout="padded", checkpointing=False))


def test_the_table_compares(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    estimates = [sum(plan.estimate(case).values()) for case in SMALL]

    def run_job(module: str, job: dict[str, Any], timeout: float) -> dict[str, Any]:
        assert [PlanCase(**case) for case in job["cases"]] == SMALL
        assert job["memory"] == "ours"
        return {"results": [{"peak_bytes": 2 * estimates[0]}, {"failed": "no memory"}]}

    monkeypatch.setattr(plan, "CASES", SMALL)
    monkeypatch.setattr(plan, "run_job", run_job)
    assert plan.main(["--json", str(tmp_path / "plan.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("llama-small, full, shared, checkpointing")
    doubled = f"{2 * estimates[0] / 2**20:,.0f}"
    assert lines[1].split()[-2:] == [doubled, "-50.0%"]
    assert lines[2].split()[-2:] == ["failed", "-"]
    kept = json.loads((tmp_path / "plan.json").read_text())["results"]
    assert [sum(one["estimate"].values()) for one in kept] == estimates


def test_cases_differ() -> None:
    names = [case.name for case in plan.CASES]
    assert len(set(names)) == len(names) and len({case.model for case in plan.CASES}) == 4
