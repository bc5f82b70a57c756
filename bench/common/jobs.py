"""A measurement in a process of its own: how it is started, and how the process answers.

A job is a dictionary that goes through JSON. It names a ``folder``, in which the result is left.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

Job = dict[str, Any]
_BENCH = Path(__file__).resolve().parents[1]


def run_job(module: str, job: Job, timeout: float, checkout: Path | None = None) -> dict[str, Any]:
    """What ``module`` of bench/, which calls :func:`serve`, answers; with a key failed if it did not come to that.

    With ``checkout``, the fastdpo of that folder is measured.
    """
    result = Path(job["folder"], "result.json")
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", module, json.dumps(job)]
    before = (str(checkout),) if checkout else ()
    path = os.pathsep.join(filter(None, (*before, str(_BENCH), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path}
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, cwd=checkout)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {timeout:,.0f} s"}
    if result.exists():
        return json.loads(result.read_text())
    if ended.returncode < 0:
        killed = f"killed by signal {-ended.returncode}"
        return {"failed": f"{killed} (out of memory?)" if ended.returncode == -9 else killed}
    last = next((line for line in reversed(ended.stderr.splitlines()) if line.strip()), "no message")
    return {"failed": f"exit status {ended.returncode}: {last.strip()}"}


def serve(work: Callable[[Job], dict[str, Any]], about: str | None) -> None:
    """Does the job on the command line and leaves the result, or what was raised, in its folder."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("job", type=json.loads)
    job = parser.parse_args().job
    with suppress(OSError):  # if memory runs out, this process shall go and no other
        Path("/proc/self/oom_score_adj").write_text("1000")
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    try:
        result = work(job)
    except Exception as error:
        # Whatever is raised is the result: the run goes on.
        result = {"failed": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}
    Path(job["folder"], "result.json").write_text(json.dumps(result))
