"""The benchmark end to end: that its arms do the same work, that it says so when they do not, and what it counts.

Nothing here looks at a time.
"""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import train
from common.jobs import Job
from common.trainers import CACHE_METHODS, trainer_classes
from end_to_end import measure as train_measure
from end_to_end import runner as train_runner
from end_to_end.agreement import differences, disagreement, tolerance
from end_to_end.arms import ARMS, Setting
from end_to_end.cases import MODELS, TrainCase, make_model, named_cases, pairs_of
from end_to_end.data import (
    ORDERS,
    load_rows,
    load_tokenizer,
    orders,
    pairs_of_group,
    read_rows,
    sample,
    sequence_lengths,
    train_tokenizer,
)
from end_to_end.tables import all_tables, answers_tables, bars
from trl.trainer import utils as trl_utils

from fastdpo.data import prepare
from fastdpo.integrations import trl as our_head
from fastdpo.model import head_calls
from fastdpo.model.scoring import Scorer

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny_case(**changes: Any) -> TrainCase:
    (case,) = named_cases("tiny", "cpu", None, steps=1, max_length=96)
    return dataclasses.replace(case, **changes)


# --------------------------------------------------------------------------------------------------------------------
# The pairs
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a case's processes find: the tokenizer and the pairs in each order."""
    made = tmp_path_factory.mktemp("case")
    train_runner.prepare(tiny_case(), None, made)
    return made


def test_orders_have_the_same_pairs_and_the_same_warm_up(folder):
    shuffled, grouped = (list(load_rows(folder / f"{order}.jsonl")) for order in ORDERS)
    case = tiny_case()
    assert len(shuffled) == case.rows == 8
    assert shuffled[: case.pairs] == grouped[: case.pairs]
    assert sorted(map(json.dumps, shuffled)) == sorted(map(json.dumps, grouped))


def test_a_step_of_groups_has_the_pairs_of_every_other_form(tmp_path):
    case = tiny_case(answers=4, pairs=2 * pairs_of(4), system_tokens=5)
    said = train_runner.prepare(case, None, tmp_path)
    assert said["sample"]["rows"] == case.rows == 24

    def steps(pairs: list[Any]) -> list[list[str]]:
        return [sorted(map(json.dumps, pairs[at : at + case.pairs])) for at in range(0, case.rows, case.pairs)]

    for order in ORDERS:
        groups = list(load_rows(tmp_path / f"{order}-groups.jsonl"))
        assert len(groups) == 4 and all(len(group["completions"]) == 4 for group in groups)
        assert len({group["prompt"][0]["content"] for group in groups}) == 1
        pairs = list(load_rows(tmp_path / f"{order}.jsonl"))
        assert steps(pairs) == steps([pair for group in groups for pair in pairs_of_group(group)])
    best = groups[0]["completions"][groups[0]["scores"].index(3.0)]
    assert sum(pair["chosen"] == best for pair in pairs_of_group(groups[0])) == 3


def test_two_answers_are_the_pairs_of_the_data(tmp_path):
    rows = read_rows(None, 96)
    train_runner.prepare(tiny_case(), None, tmp_path)
    known = {json.dumps(sorted((json.dumps(row["chosen"]), json.dumps(row["rejected"])))) for row in rows}
    for pair in load_rows(tmp_path / "shuffled.jsonl"):
        assert json.dumps(sorted((json.dumps(pair["chosen"]), json.dumps(pair["rejected"])))) in known


def test_a_sample_is_spread_over_all_lengths():
    lengths = [(1, 2 + i, 2) for i in range(100)]
    rows = [{"chosen": "a", "rejected": "b"}] * 100
    rows[50] = {"chosen": "a", "rejected": "a"}
    lengths[99] = (64, 80, 80)  # no room for a completion
    chosen = sample(rows, lengths, 10, 64)
    assert len(set(chosen)) == 10 and 50 not in chosen and 99 not in chosen
    assert [i // 10 for i in sorted(chosen)] == list(range(10))
    with pytest.raises(ValueError, match="takes 99 pairs, each once, but the data has 98 that fit into 64 tokens"):
        sample(rows, lengths, 99, 64)


def test_grouping_pads_less():
    lengths = [(1, 5 + 7 * i % 64, 5) for i in range(64)]

    def padded(order: list[int]) -> int:
        return sum(max(lengths[i][1] for i in order[k : k + 4]) for k in range(0, 64, 4))

    found = orders(list(range(64)), lengths, 4, 1)
    assert padded(found["grouped"]) < 0.9 * padded(found["shuffled"])


def test_lengths_are_those_that_fastdpo_trains_on(folder):
    rows = read_rows(None, 96)[:40]
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    dataset, _ = prepare(load_rows_of(rows), tokenizer, max_length=None)
    expected = [
        (len(row["prompt_ids"]), *(len(row["prompt_ids"] + row[side]) for side in ("chosen_ids", "rejected_ids")))
        for row in dataset
    ]
    assert sequence_lengths(rows, tokenizer) == expected


def load_rows_of(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)


def test_a_file_is_read(tmp_path):
    rows = [{"prompt": "Why?", "chosen": f" Because {i}.", "rejected": " No."} for i in range(3)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_rows(file, 64)
    assert found == rows
    tokenizer = train_tokenizer(found, 300, tmp_path / "tokenizer.json")
    assert all(0 < prompt < min(chosen, rejected) for prompt, chosen, rejected in sequence_lengths(found, tokenizer))


# --------------------------------------------------------------------------------------------------------------------
# The arms
# --------------------------------------------------------------------------------------------------------------------


def test_models_are_the_same_wherever_they_are_made():
    first, second = (make_model(tiny_case()).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert make_model(tiny_case(weights="bfloat16")).dtype == torch.bfloat16
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("name", ARMS)
@pytest.mark.parametrize("answers", [2, 3, 4, 7])
def test_every_setting_has_a_step_of_whole_micro_batches(answers, name, tmp_path):
    arm, case = ARMS[name], tiny_case(answers=answers, pairs=4 if answers == 2 else 2 * pairs_of(answers))
    _, config_class = trainer_classes(arm.library)
    assert arm.order in ORDERS and not (arm.our_head and arm.library == "fastdpo")
    for setting in arm.settings(case):
        size = setting.get("per_device_train_batch_size", case.pairs)
        assert case.pairs % size == 0
        config_class(str(tmp_path), use_cpu=True, bf16=False, **arm.options, **setting)


def test_trl_has_all_choices_at_its_best():
    for name in ("trl-best", "trl-best+head"):
        arm = ARMS[name]
        assert arm.cached and arm.order == "grouped" and len(arm.settings(tiny_case())) == 6


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a process of the benchmark replaces is put back."""
    for library, method in CACHE_METHODS.items():
        trainer_class, _ = trainer_classes(library)
        monkeypatch.setattr(trainer_class, method, getattr(trainer_class, method))
    monkeypatch.setattr(head_calls, "token_logps", head_calls.token_logps)
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", trl_utils._ChunkedLogProbFunction)
    yield
    our_head.disable()


def run(name: str, folder: Path, setting: Setting | None = None, case: TrainCase | None = None) -> dict[str, Any]:
    case = case or tiny_case()
    setting = ARMS[name].settings(case)[0] if setting is None else setting
    return train_measure.train(ARMS[name], setting, case, folder, profiled=True)


def counted(name: str, folder: Path, width: str) -> float:
    """Tokens of the step that counts, as the arm lays them out."""
    rows, tokenizer = load_rows(folder / f"{ARMS[name].order}.jsonl"), load_tokenizer(folder / "tokenizer.json")
    lengths = sequence_lengths(list(rows)[4:], tokenizer)
    cut = [(prompt, min(chosen, 96), min(rejected, 96)) for prompt, chosen, rejected in lengths]
    return {
        "padded": 8 * max(max(chosen, rejected) for _, chosen, rejected in cut),
        "repeated": sum(chosen + rejected for _, chosen, rejected in cut),
        "shared": sum(chosen + rejected - prompt for prompt, chosen, rejected in cut),
        "scored": sum(chosen + rejected - 2 * prompt for prompt, chosen, rejected in cut),
    }[width]


def test_default_arms_do_the_same_work(folder, in_this_process):
    case = tiny_case()
    theirs = run("trl", folder)
    assert theirs["build_seconds"] is None and len(theirs["losses"]) == 2 and len(theirs["steps"]) == 1
    assert (
        theirs["profile"]["policy_tokens"] == theirs["profile"]["reference_tokens"] == counted("trl", folder, "padded")
    )
    assert theirs["profile"]["head_positions"] == counted("trl", folder, "padded") - 8  # all but the last of each row
    ours = run("fastdpo", folder)
    assert disagreement(ours, theirs, "trl", case) is None
    assert ours["profile"]["policy_tokens"] == ours["profile"]["reference_tokens"] == counted("trl", folder, "shared")
    assert ours["profile"]["head_positions"] == counted("trl", folder, "scored")


def test_cached_arms_do_the_same_work(folder, in_this_process):
    case = tiny_case()
    theirs = run("trl-best+head", folder, {"gradient_checkpointing": True, "per_device_train_batch_size": 2})
    assert theirs["profile"]["head_positions"] == counted("trl-best", folder, "scored")
    our_head.disable()
    layouts = {"fastdpo-cached": "shared", "fastdpo-cached-repeated": "repeated"}
    for name, layout in layouts.items():
        for setting in ({"max_tokens_per_batch": 100}, {}):
            ours = run(name, folder, setting)
            assert disagreement(ours, theirs, "trl-best+head", case) is None
            assert ours["profile"]["policy_tokens"] == counted(name, folder, layout)
            assert ours["profile"]["reference_tokens"] == 0 and ours["build_seconds"] > 0


def test_groups_do_the_work_of_their_pairs(tmp_path, in_this_process):
    case = tiny_case(answers=3, pairs=2 * pairs_of(3))
    train_runner.prepare(case, None, tmp_path)
    theirs = run("trl-best", tmp_path, {"per_device_train_batch_size": 3}, case)
    found = {name: run(name, tmp_path, {}, case) for name in ("fastdpo-cached", "fastdpo-groups")}
    for ours in found.values():
        assert disagreement(ours, theirs, "trl-best", case) is None
        assert ours["profile"]["policy_tokens"] < theirs["profile"]["policy_tokens"] / 2
    pairs, groups = (one["profile"] for one in found.values())
    assert groups["policy_tokens"] == pairs["policy_tokens"] and groups["head_positions"] == pairs["head_positions"]


def test_no_run_reads_the_cache_of_another(folder, in_this_process, monkeypatch):
    before = sorted(folder.iterdir())
    asked = []
    score = Scorer.score

    def counting(*args: Any, **kwargs: Any) -> Any:
        asked[-1] += not torch.is_grad_enabled()  # the reference's
        return score(*args, **kwargs)

    monkeypatch.setattr(Scorer, "score", counting)
    for _ in range(2):
        asked.append(0)
        run("fastdpo-cached", folder)
    assert asked[0] == asked[1] > 0
    assert sorted(folder.iterdir()) == before


def test_every_part_of_a_step_is_found(folder, in_this_process):
    found = run("fastdpo", folder)["profile"]
    assert all(found[name] > 0 for name in ("reference", "body", "head", "optimizer", "other"))


def test_another_loss_is_noticed(folder, in_this_process):
    right = run("fastdpo-cached", folder)
    wrong = run("fastdpo-cached", folder, case=tiny_case(beta=0.12))
    said = disagreement(wrong, right, "fastdpo-cached", tiny_case())
    assert said is not None and said.startswith("the gradient norm of step 0 is")


# --------------------------------------------------------------------------------------------------------------------
# Agreement
# --------------------------------------------------------------------------------------------------------------------

RUN = {"losses": [math.log(2), 0.7], "grad_norms": [5.0, 6.0]}


def test_what_rounding_explains_is_agreement():
    case = tiny_case()
    near = {"losses": [math.log(2) * (1 + 5e-5), 0.7], "grad_norms": [5.0, 6.0 * (1 - 5e-5)]}
    assert disagreement(near, RUN, "trl", case) is None
    assert differences(near, RUN) == {"loss": pytest.approx(5e-5 * math.log(2)), "grad_norm": pytest.approx(5e-5)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"losses": [math.log(2), 0.7002]}, "the loss of step 1 is 0.700200, where trl has 0.700000 (within 6.9e-05)"),
        ({"losses": [math.nan, 0.7]}, "the loss of step 0 is nan"),
        ({"grad_norms": [5.001, 6.0]}, "the gradient norm of step 0 is 5.001, where trl has 5 (within 1.0e-04"),
        ({"losses": [math.log(2)]}, "made 1 steps, where trl made 2"),
    ],
)
def test_what_rounding_does_not_explain_is_named(change, said):
    assert said in disagreement(RUN | change, RUN, "trl", tiny_case())


def test_tolerances_follow_the_dtype():
    exact, rounded = tolerance(tiny_case()), tolerance(tiny_case(dtype="bfloat16"))
    assert exact.loss < 1e-4 < rounded.loss < 0.1 and exact.grad_norm < rounded.grad_norm < 0.1
    deeper = tolerance(dataclasses.replace(tiny_case(dtype="bfloat16"), name="llama-34m"))
    assert deeper.grad_norm == pytest.approx(rounded.grad_norm * math.sqrt(3))


# --------------------------------------------------------------------------------------------------------------------
# Rounds and tables
# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fake_jobs(monkeypatch) -> list[Job]:
    """In place of processes: figures that follow from arm and setting. Returns what was asked for."""
    asked: list[Job] = []

    def answer(module: str, job: Job, timeout: float, checkout: Path | None) -> dict[str, Any]:
        assert module == "end_to_end.measure" and checkout is None
        asked.append(job)
        if job["setting"].get("per_device_train_batch_size") == 2:
            return {"failed": "RuntimeError: not this size"}
        slow = sum(one["arm"] == job["arm"] for one in asked)  # each run slower than the one before
        seconds = slow * {"trl": 4.0, "trl-best": 2.0, "fastdpo": 2.0, "fastdpo-cached": 0.5}[job["arm"]]
        parts = dict.fromkeys(("reference", "body", "head", "optimizer", "other"), 0.25)
        counts = dict.fromkeys(("policy_tokens", "reference_tokens", "head_positions"), 2_000)
        return {
            "seconds": seconds / (2 if job["setting"].get("gradient_checkpointing") else 1),
            "steps": [seconds],
            "cpu_seconds": seconds,
            "peak_bytes": 10**8 if job["arm"].startswith("fastdpo") else 4 * 10**8,
            "build_seconds": 0.25 if ARMS[job["arm"]].cached else None,
            "losses": [0.69],
            "grad_norms": [5.0 if job["arm"] != "fastdpo" else 5.5],
            "profile": parts | counts if job["profiled"] else None,
        }

    monkeypatch.setattr(train_runner, "run_job", answer)
    return asked


def options(**changes: Any) -> train_runner.Options:
    given = {"arms": ["fastdpo-cached", "trl", "trl-best"], "rounds": 3, "tune": False, "profile": False}
    return train_runner.Options(**given | {"threads": None, "data": None, "timeout": 60} | changes)


def test_rounds_take_the_arms_in_turn(fake_jobs):
    found = train_runner.run_case(tiny_case(), options(profile=True), lambda _: None)
    arms = ["trl", "trl-best", "fastdpo-cached"]  # TRL's first: the others are compared with them
    assert [job["arm"] for job in fake_jobs] == arms * 4
    assert [job["profiled"] for job in fake_jobs] == [False] * 9 + [True] * 3
    ours = found["arms"]["fastdpo-cached"]
    assert ours["seconds"] == 1.0 and ours["pairs_per_second"] == 4.0 and ours["compared_with"] == "trl-best"
    assert ours["speed_over"] == {"trl": 8, "trl-best": 4, "fastdpo-cached": 1}
    assert ours["speed_over_1_epochs"]["trl-best"] == pytest.approx((4 / 4 + 0.25) / (1 / 4 + 0.25))
    assert ours["memory_over"]["trl-best"] == 0.25
    text = all_tables(found)
    assert "fastdpo-cached        4        2, 3   8.00        4.00" in text
    assert "fastdpo-cached          2,000             2,000           2,000       0.25  0.25" in text
    assert all(bar["holds"] for bar in bars(found)) and "NO" not in text


def test_the_fastest_setting_that_works_is_kept(fake_jobs):
    found = train_runner.run_case(tiny_case(), options(tune=True, arms=["trl-best"], rounds=1), lambda _: None)
    arm = found["arms"]["trl-best"]
    assert len(arm["tried"]) == 6 and sum("failed" in one for one in arm["tried"]) == 2
    assert arm["setting"] == {"gradient_checkpointing": False, "per_device_train_batch_size": 4}
    assert "gradient_checkpointing True, per_device_train_batch_size 1" in all_tables(found)


def test_trl_tries_its_settings_on_one_prompt_of_several_answers(fake_jobs):
    """Option by option, and those that fail are not gone on with."""
    case = tiny_case(answers=4, pairs=2 * pairs_of(4), steps=3)
    how = options(tune=True, arms=["trl-best", "fastdpo-cached"], rounds=1)
    found = train_runner.run_case(case, how, lambda _: None)
    tried = found["arms"]["trl-best"]["tried"]
    assert [
        (one["setting"]["per_device_train_batch_size"], one["setting"]["gradient_checkpointing"]) for one in tried
    ] == [
        (3, False),
        (2, False),
        (1, False),
        (3, True),
    ]
    assert "failed" in tried[1] and {one["pairs"] for one in tried} == {6}
    asked = [(job["case"]["pairs"], job["case"]["steps"]) for job in fake_jobs if job["arm"] == "trl-best"]
    assert asked == [(6, 1)] * 4 + [(12, 3)]
    ours = [(job["case"]["pairs"], job["case"]["steps"]) for job in fake_jobs if job["arm"] == "fastdpo-cached"]
    assert ours == [(12, 2)] * 3 + [(12, 3)]
    assert found["arms"]["trl-best"]["setting"] == {"gradient_checkpointing": False, "per_device_train_batch_size": 3}
    # The third try, in six seconds, made six pairs.
    assert "gradient_checkpointing False, per_device_train_batch_size 1        1  400" in all_tables(found)


def test_a_table_over_the_answers(fake_jobs):
    how = options(arms=["fastdpo-cached"], rounds=1, profile=True)
    cases = [train_runner.run_case(tiny_case(answers=k, pairs=2 * pairs_of(k)), how, lambda _: None) for k in (2, 3)]
    first, *steps = answers_tables(cases).splitlines()
    columns = ["pairs", "of their rows", "through the body", "head positions", "s/step", "ms/token", "pairs/s"]
    assert " ".join(first.split()) == " ".join(["fastdpo-cached, float32", *columns])
    assert [step.split()[:3] for step in steps] == [["2", "answers", "2"], ["3", "answers", "6"]]
    data = cases[1]["data"]
    assert data["counted"]["rows"] == 6 and data["sample"]["rows"] == 12
    rows = data["counted"]["tokens"]
    assert steps[1].split()[3:] == [f"{rows:,.0f}", "2,000", "2,000", "1.5", "0.75", "4"]
    assert answers_tables(cases[:1]) == ""


def test_an_arm_that_computes_something_else_has_no_figures(fake_jobs):
    found = train_runner.run_case(tiny_case(), options(arms=["fastdpo", "trl"]), lambda _: None)
    assert found["arms"]["fastdpo"]["status"] == "failed" and found["arms"]["trl"]["status"] == "measured"
    said = "fastdpo: FAILED: IT COMPUTES SOMETHING ELSE: the gradient norm of step 0 is 5.5, where trl has 5 (within"
    assert said in all_tables(found)


def test_exit_status_json_show_and_plot(fake_jobs, tmp_path, capsys):
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    arguments = ["--quick", "--device", "cpu", "--arms", "trl,trl-best,fastdpo-cached", "--json", str(out)]
    assert train.main(arguments) == 0
    printed = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert set(report) == {"command", "commit", "machine", "versions", "build_info", "cases"}
    assert len(report["cases"][0]["arms"]) == 3 and report["cases"][0]["bars"][0]["holds"]
    assert train.main(["--show", str(out), "--plot", str(plot)]) == 0
    tables = printed[printed.index("tiny, float32") :]
    assert tables in capsys.readouterr().out and plot.read_bytes().startswith(b"\x89PNG")
    assert train.main(["--quick", "--device", "cpu", "--arms", "trl,fastdpo"]) == 1


# --------------------------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--arms", "trl,slowdpo"], "--arms names 'slowdpo'; it may name trl, "),
        (["--dtype", "float8"], "--dtype names 'float8'; it may name float32, bfloat16"),
        (["--steps", "0"], "--steps is 0; it should be at least 1"),
        (["--pairs", "3"], "--pairs is 3; it should be a multiple of 4"),
        (["--data", "nowhere.jsonl"], "--data nowhere.jsonl: there is no such file"),
        (["--before", "nowhere"], "--before nowhere: no checkout of fastdpo"),
        (["--arms", "fastdpo-before"], "--arms names fastdpo-before, which needs --before FOLDER"),
        (["--answers", "4,one"], "--answers is '4,one'; it should be numbers of at least 2, with commas"),
        (["--answers", "4", "--pairs", "8"], "--pairs is the number of prompts' pairs with --answers; give --prompts"),
        (["--prompts", "2"], "--prompts counts prompts with --answers"),
        (["--show", "nowhere.json"], "--show nowhere.json: there is no such file"),
        (["--case", "huge"], "invalid choice: 'huge'"),
    ],
)
def test_wrong_flags_are_named(arguments, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.parse_arguments(arguments)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", MODELS)
def test_flags_change_a_case(name):
    cases = train.cases_for(train.parse_arguments(["--case", name, "--device", "cpu", "--steps", "2"]))
    assert {case.steps for case in cases} == {2} and {case.pairs for case in cases} == {4}
    chosen = train.parse_arguments(["--case", name, "--device", "cpu", "--dtype", "bfloat16"])
    assert [case.dtype for case in train.cases_for(chosen)] == ["bfloat16"]
    several = train.parse_arguments(["--case", name, "--device", "cpu", "--dtype", "bfloat16", "--answers", "2,4,7"])
    assert [(case.answers, case.pairs, case.prompts) for case in train.cases_for(several)] == [
        (2, 2, 2),
        (4, 12, 2),
        (7, 42, 2),
    ]
    assert several.arms == ["trl-best", "trl-best+head", "fastdpo-cached", "fastdpo-groups"]


@pytest.mark.slow
def test_quick_measures_in_processes(tmp_path):
    command = [sys.executable, train.__file__, "--quick", "--device", "cpu", "--json", str(tmp_path / "out.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert {arm["status"] for arm in found["arms"].values()} == {"measured"}
    assert found["arms"]["fastdpo-cached"]["differences"]["loss"] < found["tolerance"]["loss"]
