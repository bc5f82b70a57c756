"""The RLHF benchmark around its arms: task, ledger, endpoints, ratios, and what is kept. Nothing looks at a time."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
import rlhf
import torch
from against_rlhf import evaluate as rlhf_evaluate
from against_rlhf import jobs as rlhf_jobs
from against_rlhf import measure as rlhf_measure
from against_rlhf.arms import ARMS
from against_rlhf.evaluate import TARGETS, Target, Watcher, evaluate, reached
from against_rlhf.jobs import Workshop
from against_rlhf.ledger import PARTS, Ledger, forward_flops, sampling_flops
from against_rlhf.plot import plot_frontier, plot_ledger
from against_rlhf.protocol import choose, endpoints
from against_rlhf.results import TOTALS, costs, ratio_of, summary, total, tuning_cost
from against_rlhf.tables import text_tables
from against_rlhf.task import Task, sample_pairs
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from fastdpo.demo.language_model import build_model, train_tokenizer
from fastdpo.demo.sampling import Completion

pytestmark = pytest.mark.usefixtures("one_thread")

# The probability with which a statistical check here may fail although all is well.
FAILURE = 1e-6


# --------------------------------------------------------------------------------------------------------------------
# The task
# --------------------------------------------------------------------------------------------------------------------


def lengths(completions: Sequence[Completion]) -> list[float]:
    return [0.1 * len(completion.text) for completion in completions]


@pytest.fixture(scope="module")
def task() -> Task:
    words = "the quick brown fox jumps over lazy dogs and runs"
    tokenizer = train_tokenizer([words] * 4, 300)
    model = build_model(tokenizer, hidden_size=64, layers=1, seed=0).eval()
    # A random model hardly ever ends: it is made to, with one token in four.
    with torch.no_grad():
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(0.01 * model.lm_head.weight)
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
        model.lm_head.bias[tokenizer.eos_token_id] = math.log(len(tokenizer) / 3)
    return Task("toy", model, tokenizer, words.split(), ["fox", "dogs", "runs"], lengths, 12)


def test_pairs_are_of_two_ended_texts_and_labelled_by_bradley_and_terry(task):
    pairs = sample_pairs(task, 3_000, seed=1)
    assert len(pairs) == 3_000
    assert {pair.prompt for pair in pairs} == set(task.prompts)
    # The chance of each label is known, so the number of right ones is a sum of known Bernoulli variables.
    chances = [1 / (1 + math.exp(-abs(pair.chosen_reward - pair.rejected_reward))) for pair in pairs]
    allowed = math.sqrt(len(pairs) * math.log(2 / FAILURE) / 2)  # Hoeffding
    right = sum(pair.is_right for pair in pairs if pair.chosen_reward != pair.rejected_reward)
    expected = sum(
        chance for chance, pair in zip(chances, pairs, strict=True) if pair.chosen_reward != pair.rejected_reward
    )
    assert abs(right - expected) <= allowed
    for pair in pairs:
        assert pair.chosen != pair.rejected
        assert pair.chosen_reward == pytest.approx(0.1 * len(pair.chosen))
        assert pair.rejected_reward == pytest.approx(0.1 * len(pair.rejected))


def test_pairs_depend_on_the_seed_alone(task):
    assert sample_pairs(task, 20, seed=3) == sample_pairs(task, 20, seed=3)
    assert sample_pairs(task, 20, seed=3) != sample_pairs(task, 20, seed=4)


def test_the_start_is_at_no_distance_from_itself(task):
    found = evaluate(task, task.model, seed=5)
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found == evaluate(task, task.model, seed=5)


def test_divergence_does_not_depend_on_what_is_evaluated_together(task, monkeypatch):
    policy = copy.deepcopy(task.model)
    with torch.no_grad():
        policy.model.norm.weight.mul_(8)
    monkeypatch.setattr(rlhf_evaluate, "_TOGETHER", 3)
    apart = evaluate(task, policy, seed=5)
    monkeypatch.setattr(rlhf_evaluate, "_TOGETHER", 10_000)
    together = evaluate(task, policy, seed=5)
    assert apart["kl"] == pytest.approx(together["kl"], rel=1e-4)
    assert apart["reward"] == together["reward"]
    assert together["kl"] > 1e-3


# --------------------------------------------------------------------------------------------------------------------
# The ledger
# --------------------------------------------------------------------------------------------------------------------


def test_only_what_is_inside_a_part_counts(monkeypatch):
    ledger, clock = Ledger(), iter([1.0, 3.0, 10.0, 10.5, 20.0, 24.0])
    monkeypatch.setattr(ledger, "_now", lambda: next(clock))
    for name in ("rollout", "update", "rollout"):
        with ledger.part(name):
            pass
    assert {name: part["seconds"] for name, part in ledger.snapshot().items() if part["seconds"]} == {
        "rollout": 6.0,
        "update": 0.5,
    }


def test_parts_do_not_nest():
    ledger = Ledger()
    with pytest.raises(RuntimeError, match="value begins inside update"), ledger.part("update"), ledger.part("value"):
        pass
    with pytest.raises(RuntimeError, match="no part is open"):
        ledger.end()
    with pytest.raises(ValueError, match="model is 'critic'; it should be one of policy, "):
        ledger.count("value", "critic", tokens=1, flops=1.0)


def test_flops_are_those_that_torch_counts(task):
    rows, length, kept = 3, 7, 2
    ids = torch.zeros(rows, length, dtype=torch.int64)
    model = copy.deepcopy(task.model)
    model.set_attn_implementation("eager")  # two batched products, which torch counts, the masked half as well
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids, use_cache=False, logits_to_keep=kept)
    counted = counter.get_total_flops() - counter.get_flop_counts()["Global"][torch.ops.aten.bmm] / 2
    assert forward_flops(task.model.config, [length] * rows, rows * kept) == pytest.approx(counted, rel=1e-12)


def test_sampling_costs_a_forward_of_what_is_read(task):
    prompts, completions = torch.tensor([3, 4]), torch.tensor([5, 1])
    assert sampling_flops(task.model.config, prompts, completions) == forward_flops(task.model.config, [7, 4], 6)


# --------------------------------------------------------------------------------------------------------------------
# Endpoints
# --------------------------------------------------------------------------------------------------------------------


def look(step: int, reward: float, kl: float, seconds: float = 0.0, **parts: float) -> dict[str, Any]:
    spent = {name: {"seconds": 0.0, "flops": 0.0, "tokens": {}} for name in PARTS}
    for name, value in ({"update": seconds} | parts).items():
        key = name.replace("_", " ")
        spent[key] = {"seconds": value, "flops": 1e12 * value, "tokens": {"policy": 1_000}}
    return {"step": step, "reward": reward, "reward_error": 0.1, "kl": kl, "kl_error": 0.1, "spent": spent}


@pytest.mark.parametrize(
    ("points", "place"),
    [
        ([], None),
        ([(0, 0), (2, 1)], None),  # the last look has no second
        ([(0, 0), (2, 1), (2, 1)], 1),
        ([(2, 1), (0, 1), (2, 1), (3, 2)], 2),
        ([(2, 1), (2, 2.5), (2, 1)], None),  # too far
        ([(math.nan, 1), (math.nan, 1)], None),
    ],
)
def test_a_target_is_met_by_two_looks_in_a_row(points, place):
    assert reached([look(i, *point) for i, point in enumerate(points)], Target(1.0, 2.0)) == place


def test_watcher_ends_when_all_is_known(task, monkeypatch):
    ledger = Ledger()
    standings = iter([(0, 0), (5, 1), (5, 1), (5, 1)])
    monkeypatch.setattr(
        "against_rlhf.evaluate.evaluate", lambda *_, **__: dict(zip(("reward", "kl"), next(standings), strict=True))
    )
    watcher = Watcher(task, ledger, TARGETS, seed=0)
    assert [watcher(step, task.model) for step in range(3)] == [False, False, True]
    assert [one["step"] for one in watcher.looks] == [0, 1, 2]

    # Of a reference's pass over all pairs, a look has the share that the steps so far have used.
    ledger.parts["reference"].seconds = 8.0
    ledger.count("reference", "reference", tokens=100, flops=40.0)
    sparing = Watcher(task, ledger, TARGETS, seed=0, pairs_of_step=0.25)
    monkeypatch.setattr("against_rlhf.evaluate.evaluate", lambda *_, **__: {"reward": 0.0, "kl": 0.0})
    for step in (0, 1, 3, 9):
        sparing(step, task.model)
    assert [one["spent"]["reference"]["seconds"] for one in sparing.looks] == [0, 2, 6, 8]
    assert sparing.looks[1]["spent"]["reference"] == {"seconds": 2, "flops": 10, "tokens": {"reference": 25}}
    assert ledger.parts["reference"].seconds == 8

    lost = Watcher(task, ledger, TARGETS, seed=0)
    monkeypatch.setattr("against_rlhf.evaluate.evaluate", lambda *_, **__: {"reward": 0.0, "kl": 100.0})
    assert lost(0, task.model)

    # Once it has met the targets further off, a policy that is too far away for the nearest one is done.
    standings = iter([(5, 3), (5, 3), (5, 5), (5, 3), (5, 5), (5, 5)])
    monkeypatch.setattr(
        "against_rlhf.evaluate.evaluate", lambda *_, **__: dict(zip(("reward", "kl"), next(standings), strict=True))
    )
    beyond = Watcher(task, ledger, TARGETS, seed=0)
    assert [beyond(step, task.model) for step in range(6)] == [False] * 5 + [True]


def trial(*points: tuple[float, float, float]) -> dict[str, Any]:
    """Looks of (reward, KL, seconds), the last one seen twice."""
    looks = [look(i, *point) for i, point in enumerate([*points, points[-1]])]
    return {"settings": {"learning_rate": 1e-3, "beta": 0.1}, "looks": looks}


def test_the_cheapest_trial_is_chosen_for_each_target():
    slow = trial((1, 1, 10), (1, 1, 10), (1.5, 3, 20), (1.5, 3, 20), (2, 5, 30))
    fast_but_far = trial((1, 3, 1), (1.6, 3.5, 2))
    assert choose([slow, fast_but_far]) == [0, 1, 0]


def test_where_no_trial_met_a_target_the_best_within_its_leash_is_chosen():
    poor, better, failed = trial((0.1, 1, 1)), trial((0.2, 1, 9)), {"settings": {}, "failed": "out of memory"}
    assert choose([poor, failed, better]) == [2, 2, 2]


@given(st.lists(st.floats(0.1, 100) | st.just(math.inf) | st.just(math.nan), max_size=9))
def test_summary_has_the_median_inside_its_interval(values):
    found = summary(values)
    known = [value for value in values if not math.isnan(value)]
    json.loads(json.dumps(found, allow_nan=False))
    assert found["seeds"] == len(known)
    if known:
        low, middle, high = (float(value) for value in [found["interval"][0], found["median"], found["interval"][1]])
        assert middle == statistics.median(known)
        assert min(known) <= low <= middle <= high <= max(known)


def made_up() -> dict[str, Any]:
    """Two arms, three seeds; PPO takes 4, 5 and 6 times DPO's seconds, and its last seed never meets target 1."""
    ppo = [trial((1, 1, 8.0)), trial((1, 1, 10.0)), trial((1.0, 1, 12.0))]
    for run in ppo:
        for one in run["looks"]:
            one["spent"]["reward model"] = {"seconds": 2.0, "flops": 2e12, "tokens": {"reward model": 5}}
    for run in ppo[:2]:
        run["looks"] += [look(5, 1.5, 3, 20.0), look(6, 1.5, 3, 20.0)]
    dpo = [trial((1, 1, 2.0), (1, 1, 2.0), (1.5, 3, 4.0)) for _ in range(3)]
    tried = {"settings": {"learning_rate": 1e-3, "beta": 0.1}}
    runs = {"ppo": {"0": ppo}, "dpo-eager": {"0": dpo}}
    found: dict[str, Any] = {
        "model": {"parameters": 10},
        "labelling": {str(seed): {"seconds": 7.0, "agreement": 0.8} for seed in range(3)},
        "trials": {"ppo": [trial((1, 1, 30.0)), tried], "dpo-eager": [tried]},
        "chosen": {name: [0, 0, 0] for name in runs},
        "runs": runs,
        "memory": {"ppo": {"peak_bytes": 5e6}, "dpo-eager": {"peak_bytes": None}},
    }
    found["endpoints"] = {name: endpoints(found, name) for name in runs}
    found["ratios"] = [
        {"what": "x", "over": ["ppo", "dpo-eager"], "target": i, **ratio_of(found, "ppo", "dpo-eager", i)}
        for i in range(len(TARGETS))
    ]
    return found


def test_costs_and_ratios_by_hand():
    found = made_up()
    assert costs(found, "ppo", 0, "training", "seconds") == [8, 10, 12]
    assert costs(found, "ppo", 0, "with models", "flops") == [10e12, 12e12, 14e12]
    assert tuning_cost(found, "ppo", "seconds") == 30
    assert costs(found, "ppo", 0, "with tuning", "seconds") == [40, 42, 44]
    assert costs(found, "ppo", 1, "training", "seconds") == [20, 20, math.inf]

    ratios = found["ratios"][0]["ratios"]
    assert ratios["training, seconds"]["median"] == 5
    assert ratios["training, seconds"]["interval"] == [4, 6]
    assert ratios["with models, seconds"]["median"] == 6
    assert found["ratios"][1]["ratios"]["training, seconds"] | {"interval": 0} == {
        "median": 5,
        "interval": 0,
        "seeds": 3,
    }
    assert found["ratios"][1]["ratios"]["training, seconds"]["interval"][1] == "inf"
    assert found["ratios"][2]["ratios"]["training, seconds"]["median"] is None
    assert set(TOTALS) == {"training", "with models", "with tuning"}
    assert total(found["runs"]["ppo"]["0"][0]["looks"][0]["spent"], "with models") == 10


def test_tables_and_pictures_show_what_was_found(tmp_path):
    found = made_up()
    found["runs"]["ppo"]["0"].append({"failed": "killed by signal 9 (out of memory?)"})
    found["endpoints"] = {name: endpoints(found, name) for name in found["runs"]}
    printed = text_tables(json.loads(json.dumps(found)))
    assert "2 of 4" in printed  # the second target: two seeds met it, one did not, one failed
    assert "5 [4, 6]" in printed
    assert "ppo: FAILED: killed by signal 9" in printed
    exact = {
        "ppo": {"points": [{"step": 0, "kl": 0.0, "reward": 0.0, "gap": 0.0}], "frontier": [{"kl": 0, "reward": 0}]}
    }
    plot_frontier({"text": found, "exact": exact}, "a machine", tmp_path / "frontier.png")
    plot_ledger(found, "a machine", tmp_path / "ledger.png")
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("frontier.png", "ledger.png"))


# --------------------------------------------------------------------------------------------------------------------
# What is kept, and a whole run
# --------------------------------------------------------------------------------------------------------------------


def test_what_is_done_is_not_done_again_and_what_failed_is(tmp_path, monkeypatch):
    asked: list[int] = []

    def answer(_: Any, job: dict[str, Any], timeout: float) -> dict[str, Any]:
        asked.append(job["seed"])
        return {"failed": "timeout"} if job["seed"] == 2 and asked.count(2) == 1 else {"seed": job["seed"]}

    monkeypatch.setattr(rlhf_jobs, "run_job", answer)
    jobs = [{"kind": "label", "seed": seed} for seed in (1, 2, 3)]

    def workshop(**common: Any) -> Workshop:
        return Workshop(tmp_path, common, processes=1, timeout=1.0, say=lambda _: None)

    assert workshop().run(jobs) == [{"seed": 1}, {"failed": "timeout"}, {"seed": 3}]
    assert workshop().run(jobs) == [{"seed": 1}, {"seed": 2}, {"seed": 3}]
    assert asked == [1, 2, 3, 2]
    workshop(demo="another").run(jobs[:1])
    assert asked == [1, 2, 3, 2, 1]


def test_a_whole_run_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    def in_this_process(_: Any, job: dict[str, Any], timeout: float) -> dict[str, Any]:
        return json.loads(json.dumps(rlhf_measure.work(json.loads(json.dumps(job)))))

    monkeypatch.setattr(rlhf_jobs, "run_job", in_this_process)
    monkeypatch.setattr(rlhf.machine, "warn_of_load", lambda _: None)
    small = {"corpus_size": 300, "hidden_size": 64, "layers": 1, "base_steps": 20, "max_new_tokens": 64, "threads": 1}
    monkeypatch.setattr(rlhf, "_QUICK_BASE", small)
    for name in ("ppo", "dpo-eager", "dpo-fastdpo"):
        quick = dataclasses.replace(ARMS[name], steps=2, look_every=1, batch_size=8)
        monkeypatch.setitem(ARMS, name, quick)
    flags = ["--quick", "--tiers", "text", "--arms", "ppo,dpo-eager,dpo-fastdpo", "--pairs", "16"]
    flags += ["--jobs", "1", "--work", str(tmp_path / "work"), "--json", str(tmp_path / "out.json")]
    assert rlhf.main(flags) == 0
    first = json.loads((tmp_path / "out.json").read_text())
    for name in ("ppo", "dpo-eager", "dpo-fastdpo"):
        ((run,),) = first["text"]["runs"][name].values()
        assert [one["step"] for one in run["looks"]] == [0, 1, 2]
        assert run["looks"][-1]["spent"]["update"]["flops"] > 0
        assert first["text"]["memory"][name]["peak_bytes"] > 0
    capsys.readouterr()

    monkeypatch.setattr(rlhf_jobs, "run_job", lambda *_: pytest.fail("was done already"))
    assert rlhf.main([*flags, "--plot", str(tmp_path / "plots")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["text"] == first["text"]
    printed = capsys.readouterr().out
    assert rlhf.main(["--show", str(tmp_path / "out.json")]) == 0
    assert capsys.readouterr().out == printed
    assert (tmp_path / "plots" / "ledger.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arms", "ppo,dqn"], "--arms names 'dqn'; it may name ppo, "),
        (["--tiers", "image"], "--tiers names 'image'"),
        (["--seeds", "0"], "--seeds is 0; it should be at least 1"),
        (["--show", "nowhere.json"], "there is no such file"),
    ],
)
def test_bad_flags_get_a_message(flags, message, capsys):
    with pytest.raises(SystemExit):
        rlhf.main(flags)
    assert message in capsys.readouterr().err
