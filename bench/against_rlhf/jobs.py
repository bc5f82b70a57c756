"""Runs the jobs of the RLHF benchmark, several processes at a time; what is done is kept, and not done again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common.jobs import Job, run_job

_MODULE = "against_rlhf.measure"


class Workshop:
    """A folder in which every job has one of its own.

    Args:
        root: made if it is not there; a broken-off benchmark goes on where it was.
        common: put into every job; a job that differs in it is another job.
        processes: at a time, each with one thread.
        timeout: seconds for one job.
        say: told what is being done.
    """

    def __init__(self, root: Path, common: Job, *, processes: int, timeout: float, say: Callable[[str], None]) -> None:
        self._root, self._common = root, common
        self._processes, self._timeout, self._say = processes, timeout, say
        # Models and pairs that jobs share are those of the same configuration and commit.
        self._shared = root / f"shared-{_digest(common)}"
        self._shared.mkdir(parents=True, exist_ok=True)

    def run(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """What each found, in their order; with a key failed if it did not come to that, and then tried again by the
        next call."""
        with ThreadPoolExecutor(self._processes) as pool:
            return list(pool.map(self._run_one, jobs))

    def _run_one(self, job: Job) -> dict[str, Any]:
        whole = self._common | job
        folder = self._root / f"{job['kind']}-{_digest(whole)}"
        kept = folder / "found.json"
        if kept.exists():
            return json.loads(kept.read_text())["found"]
        folder.mkdir(exist_ok=True)
        self._say(_describe(job))
        found = run_job(
            _MODULE,
            whole | {"folder": str(folder), "shared": str(self._shared), "threads": 1},
            self._timeout,
        )
        if "failed" not in found:
            unfinished = kept.with_suffix(".unfinished")
            unfinished.write_text(json.dumps({"job": whole, "found": found}))
            unfinished.rename(kept)
        return found


def _digest(job: Job) -> str:
    return hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]


def _describe(job: Job) -> str:
    settings = job.get("settings", {})
    words = [job["kind"], job.get("arm", "")]
    words += [f"learning rate {settings['learning_rate']:g}, beta {settings['beta']:g}"] if settings else []
    words += [f"seed {settings.get('seed', job.get('seed'))}"] if settings or "seed" in job else []
    return " ".join(word for word in words if word)
