"""Runs under tensor, expert and context parallelism that end at a checkpoint: gone on with, as if they had not.

All that needs as many processes shares them; each leaves what it found.
"""

from __future__ import annotations

import contextlib
import functools
import json
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from broken_runs import id_rows
from engine_matrix import (
    ENGINES,
    REFERENCES,
    VOCABULARY,
    Engine,
    Options,
    cut_model,
    few_steps,
    torchrun_launched,
)
from kills import Moment, run_ranks
from limited_ranks import Outcome, run_limited
from ranks import launched
from safetensors.torch import load_file
from tiny_models import make_model
from torch import Tensor
from torch.distributed.tensor import DTensor
from toy_data import make_tokenizer, text_rows, write_jsonl
from trainer_runs import make_trainer

from fastdpo.errors import RANK_LOST
from fastdpo.trainer import DPOTrainer
from fastdpo.trainer.checkpoints import find_checkpoints

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached", "one_thread_in_processes")

STEPS, SAVE_STEPS = 4, 2
TOLERANCE = 1e-5

# Each has the same pairs a step as the one that it goes on with, in as many processes.
OTHERS = {
    "TP": Engine(torchrun_launched, "", models=lambda seed: cut_model(seed, fsdp_size=2)),
    "CP": ENGINES["FSDP2"],
    "EP": replace(ENGINES["EP"], models=functools.partial(cut_model, family="mixtral", fsdp_size=2)),
    "EP x DP": replace(
        ENGINES["EP x DP"], models=functools.partial(cut_model, family="mixtral", fsdp_size=4, ep_size=4)
    ),
}


def make(engine: Engine, folder: Path, reference: str = "second model", **options: Any) -> DPOTrainer:
    defaults = few_steps(engine, STEPS) | {
        "packing": "padded",
        "save_strategy": "steps",
        "save_steps": SAVE_STEPS,
    }
    return make_trainer(folder, None, **(defaults | REFERENCES[reference](engine.models) | engine.options | options))


def left(trainer: DPOTrainer) -> dict[str, Any]:
    """Each step's loss and gradient norm, and the weights that ``save_model`` leaves."""
    trainer.save_model()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    saved = None
    if trainer.is_world_process_zero():
        (file,) = trainer.args.folder.glob("*.safetensors")
        saved = load_file(file)
    return {"steps": [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in log], "saved": saved}


# -------------------------------------------------------------------------------------------- what the processes do


def resumed(engine: Engine, folder: Path, other: Engine | None = None, **options: Any) -> dict[str, Any]:
    """An unbroken run, and one that goes on from its checkpoint, by the other engine where one is given."""
    found = {}
    for name, checkpoint in {"unbroken": None, "resumed": str(folder / f"checkpoint-{SAVE_STEPS}")}.items():
        which = engine if other is None or checkpoint is None else other
        with which.launch():
            trainer = make(which, folder, **options)
            trainer.train(resume_from_checkpoint=checkpoint)
            found[name] = left(trainer)
    return found


def best(engine: Engine, folder: Path, **options: Any) -> dict[str, Any]:
    """What the best step was, what the model is in the end, and what its checkpoints have."""
    options |= {
        "eval_dataset": id_rows(5, VOCABULARY),
        "eval_strategy": "steps",
        "eval_steps": SAVE_STEPS,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,  # so that it is an early one
    }
    with engine.launch():
        trainer = make(engine, folder, **options)
        trainer.train()
        found = left(trainer) | {"best": trainer.state.best_global_step}
    checkpoints = {path.name: path for path in find_checkpoints(folder)}
    found["are parts"] = any(isinstance(p, DTensor) for p in trainer.model.parameters())
    found["checkpoints"] = {
        name: load_file(next(path.glob("*model.safetensors"))) for name, path in checkpoints.items()
    }
    return found


Check = Callable[[Engine, Path], Any]
RESUMED: dict[str, tuple[Engine, Check]] = {
    f"{name}: {reference}": (ENGINES[name], functools.partial(resumed, reference=reference))
    for name, references in {
        "TP": REFERENCES,
        "TP x DP": ("second model", "cache"),  # an adapter is refused
        "CP": REFERENCES,
        "CP x DP": ("second model",),
        "SP": ("second model",),
        "EP": REFERENCES,
        "EP x DP": ("second model",),
        "EP x TP": ("second model", "adapter"),
    }.items()
    for reference in references
}
RESUMED["TP: no state"] = (ENGINES["TP"], functools.partial(resumed, optim="sgd"))
OTHERWISE: dict[str, tuple[Engine, Check]] = {
    f"{name}: otherwise": (ENGINES[name], functools.partial(resumed, other=other)) for name, other in OTHERS.items()
}
BEST: dict[str, tuple[Engine, Check]] = {
    "TP: best": (ENGINES["TP"], best),
    "TP: best adapter": (ENGINES["TP"], functools.partial(best, reference="adapter")),
    "TP x DP: best": (ENGINES["TP x DP"], functools.partial(best, save_only_model=True)),
    "CP: best": (ENGINES["CP"], best),
    "EP: best": (ENGINES["EP"], best),
    "EP x TP: best": (ENGINES["EP x TP"], best),
}
CHECKS = {**RESUMED, **OTHERWISE, **BEST}


def on_rank(name: str, folder: Path) -> Any:
    engine, check = CHECKS[name]
    return check(engine, folder / name)


# ------------------------------------------------------------------------------------------------ what is to be found


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Any]]:
    """What a check left on each rank; all that were chosen are made at the first call."""
    items = [item for item in request.session.items if item.module is request.module and hasattr(item, "callspec")]
    items = [item for item in items if "name" in item.callspec.params and not item.get_closest_marker("skip")]
    wanted = [item.callspec.params["name"] for item in items]
    folder, outcomes = tmp_path_factory.mktemp("resume"), dict[str, list[Outcome]]()
    for ranks in {CHECKS[name][0].ranks for name in wanted}:
        names = [name for name in wanted if CHECKS[name][0].ranks == ranks]
        work = functools.partial(on_rank, folder=folder / "runs")
        outcomes |= run_limited(work, names, ranks=ranks, limit=60.0, folder=folder / str(ranks))

    def of(name: str) -> list[Any]:
        for rank in outcomes[name]:
            assert rank.error is None, rank.error
        return [rank.value for rank in outcomes[name]]

    return of


def assert_same_bits(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for key, weight in expected.items():
        assert torch.equal(got[key], weight), key


def slow(names: Any) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", slow(RESUMED))
def test_a_resumed_run_ends_with_the_same_bits(name: str, found: Any) -> None:
    for rank in found(name):
        assert [step for step, *_ in rank["unbroken"]["steps"]] == list(range(1, STEPS + 1))
        assert rank["resumed"]["steps"] == rank["unbroken"]["steps"]
    first = found(name)[0]
    assert_same_bits(first["resumed"]["saved"], first["unbroken"]["saved"])


@pytest.mark.parametrize("name", slow(OTHERWISE))
def test_it_is_gone_on_with_where_devices_share_something_else(name: str, found: Any) -> None:
    for rank in found(name):
        for got, expected in zip(rank["resumed"]["steps"], rank["unbroken"]["steps"], strict=True):
            assert got == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("name", slow(BEST))
def test_the_best_weights_are_put_back(name: str, found: Any) -> None:
    first = found(name)[0]
    assert first["best"] == SAVE_STEPS  # and not the last
    assert first["are parts"]
    of_best, of_last = (first["checkpoints"][f"checkpoint-{step}"] for step in (SAVE_STEPS, STEPS))
    assert_same_bits(first["saved"], of_best)
    assert any(not torch.equal(weight, of_last[key]) for key, weight in of_best.items())


# ----------------------------------------------------------------------------------------------------------- kills


@contextlib.contextmanager
def in_group(launch: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    with launch():
        dist.init_process_group("gloo")
        yield


# What the run file has, what the environment has, and as what the processes are started.
KILLED: dict[str, tuple[Options, dict[str, str], Any]] = {
    "TP": (
        {"model_init_kwargs": {"distributed_config": {"tp_size": 2, "tp_plan": "auto"}}},
        {},
        torchrun_launched,
    ),
    "CP": (
        {"per_device_train_batch_size": 2},
        {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_CP_SIZE": "2"},
        launched,
    ),
}


def losses_in(run: Path) -> list[tuple[int, float, float]]:
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 1])
@pytest.mark.parametrize("kind", KILLED)
def test_one_is_killed_and_the_run_goes_on(
    kind: str, dead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the midst of it; and then, going on, while the next checkpoint is written."""
    options, environment, launch = KILLED[kind]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    model, tokenizer = tmp_path / "model", make_tokenizer()
    make_model("llama", len(tokenizer)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    settings: Options = {
        "model_name_or_path": str(model),
        "dataset_name": str(write_jsonl(tmp_path / "pairs.jsonl", text_rows(16))),
        "max_length": 128,
        "max_steps": 6,
        "save_steps": SAVE_STEPS,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "packing": "padded",
        "report_pairs": 0,
        "report_samples": 0,
        "use_cpu": True,
    }
    (tmp_path / "run.yaml").write_text(json.dumps(settings | options))

    def train(place: Path, *more: str, moment: Moment | None = None) -> tuple[list[int], list[str]]:
        place.mkdir(exist_ok=True)
        logs = [place / f"log-{rank}" for rank in range(2)]
        for log in logs:
            log.unlink(missing_ok=True)
        words = ["train", "--config", str(tmp_path / "run.yaml"), "--output_dir", str(place / "run"), *more]
        start = functools.partial(in_group, launch)
        codes = run_ranks(words, logs, None if moment is None else {dead: moment}, start)
        return codes, [log.read_text() for log in logs]

    codes, said = train(tmp_path / "unbroken")
    assert codes == [0, 0], said
    killed = [RANK_LOST, RANK_LOST]
    killed[dead] = -signal.SIGKILL
    for moment in (Moment("step", 3), Moment("rng", 1)):
        more = [] if moment.what == "step" else ["--resume_from_checkpoint", "last"]
        codes, said = train(tmp_path / "killed", *more, moment=moment)
        assert codes == killed, said
        assert f"rank {dead} (process " in said[1 - dead] and "Traceback" not in said[1 - dead], said
        assert "checkpoint-2 is whole, the last checkpoint" in said[1 - dead]
    codes, said = train(tmp_path / "killed", "--resume_from_checkpoint", "last")
    assert codes == [0, 0], said
    assert losses_in(tmp_path / "killed" / "run") == losses_in(tmp_path / "unbroken" / "run")
    assert_same_bits(*(load_file(tmp_path / place / "run" / "model.safetensors") for place in ("killed", "unbroken")))
