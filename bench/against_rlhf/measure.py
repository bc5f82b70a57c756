"""What one process of the RLHF benchmark does: make the model, label pairs, run an arm, or look at its memory."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from against_rlhf.arms import ARMS
from against_rlhf.evaluate import TARGETS, Watcher
from against_rlhf.exact import ExactTier, approach
from against_rlhf.exact_task import make_exact_task
from against_rlhf.ledger import Ledger
from against_rlhf.run import Run, Settings
from against_rlhf.task import sample_pairs
from against_rlhf.text import load_text_task, make_text_model
from common.jobs import Job, serve
from common.memory import CPUMemory

from fastdpo.demo import DemoConfig
from fastdpo.demo.preferences import Preference

_MEMORY_STEPS = 3
_FRONTIER_BETAS = [10 ** (2 - place / 20) for place in range(81)]  # from 100 to 0.01


def work(job: Job) -> dict[str, Any]:
    config = DemoConfig(**job["demo"])
    return _KINDS[job["kind"]](job, config, Path(job["shared"]))


def _make_model(job: Job, config: DemoConfig, shared: Path) -> dict[str, Any]:
    make_text_model(config, shared)
    return {"parameters": load_text_task(config, shared).model.num_parameters()}


def _label(job: Job, config: DemoConfig, shared: Path) -> dict[str, Any]:
    """The pairs of a seed; all arms take them, and owe what they cost."""
    ledger = Ledger()
    task = load_text_task(config, shared)
    with ledger.part("labelling"):
        pairs = sample_pairs(task, job["pairs"], job["seed"])
    pairs_file(shared, job["seed"]).write_text(json.dumps([dataclasses.asdict(pair) for pair in pairs]))
    return {
        "seconds": ledger.parts["labelling"].seconds,
        "agreement": sum(pair.is_right for pair in pairs) / len(pairs),
    }


def _run(job: Job, config: DemoConfig, shared: Path) -> dict[str, Any]:
    task, settings, ledger = load_text_task(config, shared), Settings(**job["settings"]), Ledger()
    pairs = _pairs(job, shared)
    watcher = Watcher(task, ledger, TARGETS, settings.seed, settings.batch_size / max(1, len(pairs)))
    ARMS[job["arm"]].train(Run(task, pairs, settings, ledger, watcher, shared))
    return {"looks": watcher.looks}


def _memory(job: Job, config: DemoConfig, shared: Path) -> dict[str, Any]:
    """The peak of a few steps beyond what was there before, the policy's own copy of the weights included."""
    task, pairs = load_text_task(config, shared), _pairs(job, shared)
    settings = dataclasses.replace(Settings(**job["settings"]), steps=_MEMORY_STEPS)
    before = CPUMemory.mark()
    ARMS[job["arm"]].train(Run(task, pairs, settings, Ledger(), lambda step, policy: False))
    return {"peak_bytes": None if before is None else CPUMemory.peak() - before}


def _exact(job: Job, config: DemoConfig, shared: Path) -> dict[str, Any]:
    """Where an arm stands as training goes on, in the task whose frontier is known, and that frontier."""
    arm, settings = ARMS[job["arm"]], Settings(**job["settings"])
    tier = ExactTier(make_exact_task(seed=0))
    pairs = sample_pairs(tier.task, job["pairs"], seed=0) if arm.has_pairs else []
    frontier = [tier.start, *tier.frontier(_FRONTIER_BETAS), tier.best]
    return {
        "points": [
            {"step": one.steps, "reward": one.point.reward, "kl": one.point.kl, "gap": one.gap}
            for one in approach(tier, arm.train, settings, pairs)
        ],
        "frontier": [{"reward": point.reward, "kl": point.kl} for point in frontier],
    }


def _pairs(job: Job, shared: Path) -> list[Preference]:
    if not ARMS[job["arm"]].has_pairs:
        return []
    rows = json.loads(pairs_file(shared, job["settings"]["seed"]).read_text())
    return [Preference(**row) for row in rows]


def pairs_file(shared: Path, seed: int) -> Path:
    return shared / f"pairs-{seed}.json"


_KINDS = {"model": _make_model, "label": _label, "run": _run, "memory": _memory, "exact": _exact}


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    serve(work, __doc__)
