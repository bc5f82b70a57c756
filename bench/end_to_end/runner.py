"""Measures a case: a process for every run, the arms in turn, round after round; what disagrees has no figures."""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.jobs import run_job
from end_to_end.agreement import differences, disagreement, tolerance
from end_to_end.arms import ARMS, Setting, by_option
from end_to_end.cases import TrainCase, pairs_of
from end_to_end.data import (
    ORDERS,
    Row,
    deal,
    describe,
    orders,
    pairs_of_group,
    read_rows,
    sample,
    save_rows,
    sequence_lengths,
    system_message,
    train_tokenizer,
)

Say = Callable[[str], None]

_ROLE = 8  # tokens, at most, that a template writes around a message
_TUNE_STEPS = 2  # of pairs that are as long as those of the whole run
_OTHER_WORK = "IT COMPUTES SOMETHING ELSE"


@dataclass(frozen=True)
class Options:
    arms: list[str]
    rounds: int
    tune: bool
    profile: bool
    threads: int | None
    data: Path | None  # None for made-up pairs
    timeout: float
    before: Path | None = None  # the other checkout of an arm that has one


class Runs:
    """Starts processes of measure.py, and compares each with the first one of its order.

    TRL's arms come first where there are any, so that the first one is TRL's.
    """

    def __init__(self, case: TrainCase, options: Options, folder: str) -> None:
        self.case, self.options, self.folder = case, options, folder
        self._first: dict[str, tuple[str, dict[str, Any]]] = {}  # order -> arm, what it found

    def run(self, arm: str, setting: Setting, profiled: bool = False) -> dict[str, Any]:
        """What the process found; with a key failed if it did not come to that, or did other work than the others."""
        job = {
            "arm": arm,
            "setting": setting,
            "case": dataclasses.asdict(self.case),
            "folder": self.folder,
            "profiled": profiled,
            "threads": self.options.threads,
        }
        checkout = self.options.before if ARMS[arm].before else None
        found = run_job("end_to_end.measure", job, self.options.timeout, checkout)
        if "failed" in found:
            return found
        first, expected = self._first.setdefault(ARMS[arm].order, (arm, found))
        if wrong := disagreement(found, expected, first, self.case):
            return {"failed": f"{_OTHER_WORK}: {wrong}"}
        return found | {"differences": differences(found, expected), "compared_with": first}


def prepare(case: TrainCase, data: Path | None, folder: Path) -> dict[str, Any]:
    """Writes the tokenizer, and the pairs (and groups) in each order; says what the pairs are."""
    rows = read_rows(data, case.max_length)
    tokenizer = train_tokenizer(rows, case.config["vocab_size"], folder / "tokenizer.json")
    lengths = sequence_lengths(rows, tokenizer)
    system = system_message(tokenizer, case.system_tokens)
    room = case.max_length - len(tokenizer(system)["input_ids"]) - _ROLE if system else case.max_length
    usable = [i for i, (prompt, _, _) in enumerate(lengths) if prompt < room]
    # A step's pairs are those of its prompts, in every order and every form.
    chosen = sample(rows, lengths, case.prompts * (case.steps + case.warmup), room)
    dealt = dict(zip(chosen, deal(rows, chosen, case, system), strict=True))
    trained: list[Row] = []
    for order, indices in orders(chosen, lengths, case.prompts, case.warmup).items():
        groups = [dealt[i] for i in indices]
        trained = [pair for group in groups for pair in pairs_of_group(group)]
        save_rows(trained, folder / f"{order}.jsonl")
        save_rows(groups, folder / f"{order}-groups.jsonl")
    trained_lengths = sequence_lengths(trained, tokenizer)
    if case.answers > 2:  # micro-batches of pairs that are about as long
        by_length = sorted(range(len(trained)), key=lambda i: (i // case.pairs, max(trained_lengths[i][1:])))
        save_rows([trained[i] for i in by_length], folder / f"{ORDERS[1]}.jsonl")
    return {
        "file": data.name if data else None,
        "tokenizer": len(tokenizer),
        "all": describe(lengths, usable, case.max_length),
        "sample": describe(trained_lengths, list(range(len(trained))), case.max_length),
        "counted": describe(trained_lengths, list(range(case.warmup * case.pairs, len(trained))), case.max_length),
    }


def run_case(case: TrainCase, options: Options, say: Say) -> dict[str, Any]:
    """Everything found, as it stands in the JSON file: see docs/benchmarks/end-to-end.md."""
    arms = sorted(options.arms, key=lambda name: ARMS[name].library != "trl")
    found: dict[str, Any] = dataclasses.asdict(case) | {
        "tolerance": dataclasses.asdict(tolerance(case)),
        "rounds": options.rounds,
        "arms": {name: {"status": "measured", "about": ARMS[name].about, "rounds": []} for name in arms},
    }
    with tempfile.TemporaryDirectory(prefix="fastdpo-bench-") as folder:
        say("tokenizer and pairs")
        found["data"] = prepare(case, options.data, Path(folder))
        runs = Runs(case, options, folder)
        for name, entry in found["arms"].items():
            entry["setting"] = ARMS[name].settings(case)[0]
        if options.tune:
            _tune(case, options, found["arms"], say)
        for number in range(options.rounds):
            for name, entry in found["arms"].items():
                if entry["status"] == "measured":
                    say(f"round {number + 1} of {options.rounds}, {name}")
                    _add(entry, runs.run(name, entry["setting"]))
        for name, entry in found["arms"].items():
            if options.profile and entry["status"] == "measured":
                say(f"where {name}'s time goes")
                profiled = runs.run(name, entry["setting"], profiled=True)
                if "failed" in profiled:
                    _fail(entry, profiled)
                else:
                    entry["profile"] = profiled["profile"]
    measured = {name: entry for name, entry in found["arms"].items() if entry["status"] == "measured"}
    for entry in measured.values():
        _summarise(entry, measured, case.pairs)
    return found


def _add(entry: dict[str, Any], result: dict[str, Any]) -> None:
    if "failed" in result:
        _fail(entry, result)
    else:
        entry["rounds"].append(result)


def _fail(entry: dict[str, Any], result: dict[str, Any]) -> None:
    entry |= {"status": "failed", "reason": result["failed"]}


def _tune(case: TrainCase, options: Options, arms: dict[str, Any], say: Say) -> None:
    """Gives each arm its fastest setting of those tried, each once in a short run. An arm has failed if all of its
    settings have, or one computes something else.

    Every setting is tried; with several answers, and so with many pairs, one option after another.
    """
    for short, names in _short_cases(case, arms):
        with tempfile.TemporaryDirectory(prefix="fastdpo-bench-") as folder:
            prepare(short, options.data, Path(folder))
            runs = Runs(short, options, folder)
            for name in names:
                settings, entry = ARMS[name].settings(short), arms[name]
                if len(settings) > 1:
                    tried = entry["tried"] = []
                    for setting in by_option(settings, tried) if case.answers > 2 else settings:
                        say(f"best setting of {name}: {setting}")
                        tried.append({"setting": setting, "pairs": short.pairs} | runs.run(name, setting))
                    _choose(entry)


def _short_cases(case: TrainCase, arms: dict[str, Any]) -> list[tuple[TrainCase, list[str]]]:
    """What settings are tried on, and the arms that try theirs on it.

    With several answers TRL's, which take the longest by far, have one step of one prompt.
    """
    short = dataclasses.replace(case, steps=min(_TUNE_STEPS, case.steps))
    if case.answers == 2:
        return [(short, list(arms))]
    one = dataclasses.replace(case, steps=1, pairs=pairs_of(case.answers))
    of_trl = [name for name in arms if ARMS[name].library == "trl"]
    others = [name for name in arms if name not in of_trl]
    return [(some, names) for some, names in ((one, of_trl), (short, others)) if names]


def _choose(entry: dict[str, Any]) -> None:
    worked = [one for one in entry["tried"] if "failed" not in one]
    wrong = next((one for one in entry["tried"] if one.get("failed", "").startswith(_OTHER_WORK)), None)
    if worked and wrong is None:
        entry["setting"] = min(worked, key=lambda one: one["seconds"])["setting"]
    else:
        _fail(entry, wrong or entry["tried"][0])


def _summarise(entry: dict[str, Any], measured: dict[str, Any], pairs: int) -> None:
    """Medians over the rounds; ratios are medians of each round's, so that what slows a round slows both sides."""
    rounds = entry["rounds"]
    entry["seconds"] = statistics.median(one["seconds"] for one in rounds)
    entry["cpu_seconds"] = statistics.median(one["cpu_seconds"] for one in rounds)
    entry["pairs_per_second"] = pairs / entry["seconds"]
    for key in ("peak_bytes", "build_seconds"):
        values = [one[key] for one in rounds if one[key] is not None]
        entry[key] = statistics.median(values) if values else None
    entry["differences"] = {key: max(one["differences"][key] for one in rounds) for key in ("loss", "grad_norm")}
    entry["compared_with"] = rounds[0]["compared_with"]
    # Alone, and with what the cached reference adds to a pair in one epoch and in three.
    for epochs in (None, 1, 3):
        key = "speed_over" if epochs is None else f"speed_over_{epochs}_epochs"
        entry[key] = {
            name: statistics.median(
                _pair_seconds(b, pairs, epochs) / _pair_seconds(a, pairs, epochs)
                for a, b in zip(rounds, other["rounds"], strict=True)
            )
            for name, other in measured.items()
        }
    entry["memory_over"] = {
        name: statistics.median(a["peak_bytes"] / b["peak_bytes"] for a, b in zip(rounds, other["rounds"], strict=True))
        for name, other in measured.items()
        if entry["peak_bytes"] and other["rounds"][0]["peak_bytes"]
    }


def _pair_seconds(one: dict[str, Any], pairs: int, epochs: int | None) -> float:
    build = one["build_seconds"] or 0.0
    return one["seconds"] / pairs + (build / epochs if epochs else 0.0)
