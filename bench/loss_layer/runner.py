"""Measures one case: a process for every measurement, the peers in turn, round after round."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from common.jobs import run_job
from loss_layer.cases import Case
from loss_layer.peers import PEERS

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    peers: list[str]
    rounds: int
    errors: bool
    tune: bool
    threads: int | None
    peer_file: str | None
    timeout: float


@dataclass
class Jobs:
    """Starts processes of measure.py that share a folder with the case's tensors."""

    case: Case
    options: Options
    folder: str

    def run(self, peer: str | None, setting: dict[str, Any]) -> dict[str, Any]:
        """What the process found; with a key failed if it did not come to that."""
        job = {
            "peer": peer,
            "setting": setting,
            "case": dataclasses.asdict(self.case),
            "device": self.case.device,
            "folder": self.folder,
            "errors": self.options.errors,
            "threads": self.options.threads,
            "peer_file": self.options.peer_file,
        }
        return run_job("loss_layer.measure", job, self.options.timeout)


def run_case(case: Case, options: Options, say: Say) -> dict[str, Any]:
    """Everything found, as it stands in the JSON file: see docs/benchmarks/loss-layer.md."""
    found: dict[str, Any] = dataclasses.asdict(case) | {
        "tokens": case.tokens,
        "scored_tokens": case.scored_tokens,
        "distinct_scored_tokens": case.distinct_scored_tokens,
        "products": case.products,
        "flops": case.flops,
        "rounds": options.rounds,
        "peers": {name: _excuse(name, case) or {"status": "measured", "rounds": []} for name in options.peers},
    }
    peers = {name: entry for name, entry in found["peers"].items() if entry["status"] == "measured"}
    with tempfile.TemporaryDirectory(prefix="fastdpo-bench-") as folder:
        jobs = Jobs(case, options, folder)
        say("tensors" + (" and float64 truth" if options.errors else ""))
        prepared = jobs.run(None, {})
        if "failed" in prepared:
            raise RuntimeError(f"making the tensors of {case.name}: {prepared['failed']}")
        found["truth"] = prepared or None
        for name, entry in peers.items():
            settings = PEERS[name].settings(case)
            entry["setting"] = settings[0]
            if options.tune and len(settings) > 1:
                _tune(jobs, name, settings, entry, say)
        for number in range(options.rounds):
            for name, entry in peers.items():
                if entry["status"] == "measured":
                    say(f"round {number + 1} of {options.rounds}, {name}")
                    _add(entry, jobs.run(name, entry["setting"]))
    for entry in peers.values():
        _summarise(entry, peers)
    return found


def _excuse(name: str, case: Case) -> dict[str, str] | None:
    if reason := PEERS[name].absent(case.device):
        return {"status": "absent", "reason": reason}
    if reason := PEERS[name].refuses(case):
        return {"status": "refused", "reason": reason}
    return None


def _add(entry: dict[str, Any], result: dict[str, Any]) -> None:
    if "failed" in result:
        entry |= {"status": "failed", "reason": result["failed"]}
    else:
        entry["rounds"].append(result)


def _tune(jobs: Jobs, name: str, settings: list[dict[str, Any]], entry: dict[str, Any], say: Say) -> None:
    """Tries every setting once and keeps the fastest. The peer has failed if all of them have."""
    tried = []
    for setting in settings:
        say(f"best setting of {name}: {setting}")
        tried.append({"setting": setting} | jobs.run(name, setting))
    entry["tried"] = tried
    worked = [one for one in tried if "failed" not in one]
    if worked:
        entry["setting"] = min(worked, key=lambda one: one["seconds"])["setting"]
    else:
        _add(entry, tried[0])


def _summarise(entry: dict[str, Any], peers: dict[str, Any]) -> None:
    """Medians over the rounds; ratios are medians of each round's, so that what slows a round slows both sides."""
    if entry["status"] != "measured":
        return
    rounds = entry["rounds"]
    entry["seconds"] = statistics.median(one["seconds"] for one in rounds)
    peaks = [one["peak_bytes"] for one in rounds if one["peak_bytes"] is not None]
    entry["peak_bytes"] = statistics.median(peaks) if peaks else None
    for other in ("floor", "fastdpo"):
        if peers.get(other, {}).get("status") == "measured":
            pairs = zip(rounds, peers[other]["rounds"], strict=True)
            entry[f"ratio_to_{other}"] = statistics.median(one["seconds"] / base["seconds"] for one, base in pairs)
    errors = [one["errors"] for one in rounds if one["errors"]]
    entry["errors"] = {key: _worst([one[key] for one in errors]) for key in errors[0]} if errors else None


def _worst(values: list[Any]) -> Any:
    """The largest error of the rounds; what is not a number is the same in all of them."""
    return max(values) if isinstance(values[0], float) else values[0]
