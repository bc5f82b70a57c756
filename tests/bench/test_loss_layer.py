"""The benchmark of the loss layer: that it runs to its end whatever a peer does, and that all peers compute one thing.

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

import outputs
import pytest
import run
import torch
import torch.nn.functional as F
from common import machine
from loss_layer import runner
from loss_layer.cases import BETA, HEADS, IGNORE_INDEX, Case, named_case, pairs_of
from loss_layer.peers import PEERS, Peer
from loss_layer.plot import plot_sweeps
from loss_layer.problem import Problem
from loss_layer.tables import case_table, sweep_tables
from loss_layer.tensors import load_problem, make_problem, save_problem
from loss_layer.truth import compute_truth, errors
from oracle import assert_within
from torch import Tensor

from fastdpo.logps import OUTPUTS
from fastdpo.logps import oracle as reference

pytestmark = pytest.mark.usefixtures("one_thread")

SCRIPT = Path(run.__file__)
UNIT = 2.0**-24  # float32's rounding

VARIANTS: dict[str, dict[str, Any]] = {
    "all trainable": {},
    "frozen": {"frozen": True},
    "cached": {"cached": True},
    "softcap": {"softcap": 5.0},
    "no prompt": {"prompt_share": 0.0},
    "answers": {"answers": 3, "pairs": 6},
}


def small_case(**changes: Any) -> Case:
    case = named_case("tiny", "cpu", pairs=3, length=12)
    return dataclasses.replace(case, **{"hidden_size": 32, "vocab_size": 300} | changes)


@pytest.fixture(scope="module")
def eager() -> Iterator[None]:
    """Peers that compile run as they are written: compiling takes most of a minute and changes no meaning."""
    with torch.compiler.set_stance("force_eager"):
        yield


@dataclasses.dataclass
class Exact:
    """The step in float64 by autograd, and what float32 may differ by."""

    loss: float
    logps: Tensor
    gradients: dict[str, Tensor]
    loss_bound: float
    logps_bound: Tensor
    gradient_bounds: dict[str, Tensor]


def exact_step(problem: Problem) -> Exact:
    """The bounds are worst cases of sums in any order, from the sizes of their terms: a logit, of H terms, errs by H
    roundings of them; a log-probability by twice that and V roundings, for the sum of exponentials; the slope of a
    pair's loss by beta times the errors of its four log-probabilities; a gradient by all of these, relative to its
    terms, and by its own sum."""
    softcap = problem.case.softcap
    hidden = problem.scored(problem.hidden).detach().double().requires_grad_()
    weight = problem.weight.detach().double().requires_grad_()
    targets = problem.scored(problem.targets)
    token_logps = reference.token_logps(hidden, weight, targets, softcap=softcap).logps
    logps, ref_logps = problem.sum_sequences(token_logps), problem.ref_logps
    if ref_logps is None:
        ref_hidden, ref_weight = problem.scored(problem.ref_hidden).double(), problem.ref_weight.double()
        ref_token_logps = reference.token_logps(ref_hidden, ref_weight, targets, softcap=softcap).logps
        ref_logps = problem.sum_sequences(ref_token_logps)
    chosen, rejected = (logps - ref_logps.double()).chunk(2)
    loss = -F.logsigmoid(BETA * (chosen - rejected)).mean()
    slopes, grad_hidden, grad_weight = torch.autograd.grad(loss, (token_logps, hidden, weight))

    with torch.no_grad():
        (n, h), v = hidden.shape, len(weight)
        logits = reference.logits(hidden, weight, None, softcap=softcap)
        logit_error = UNIT * ((h + 2) * hidden.abs() @ weight.abs().T + 8 * logits.abs()).amax(-1)
        token_error = 2 * logit_error + UNIT * (v + 2 * token_logps.abs())
        logps_bound = problem.sum_sequences(token_error) + UNIT * problem.case.length * logps.abs()
        # The reference's log-probabilities err as the policy's do: its tensors are the policy's, a little moved.
        margin_error = BETA * 2 * 1.1 * sum(logps_bound.chunk(2)).max()
        relative = margin_error + 4 * logit_error.max() + UNIT * (2 * v + n + h + 64)
        sizes = slopes.abs()[:, None] * (F.one_hot(targets, v) + logits.softmax(-1))
        bounds = {"hidden": relative * sizes @ weight.abs(), "weight": relative * sizes.T @ hidden.abs()}
    return Exact(
        loss=loss.item(),
        logps=logps.detach(),
        gradients={"hidden": grad_hidden, "weight": grad_weight},
        loss_bound=float(margin_error + 8 * UNIT),
        logps_bound=logps_bound,
        gradient_bounds=bounds,
    )


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", [name for name in PEERS if name != "floor"])
def test_every_peer_computes_the_same(name, variant):
    case = small_case(**VARIANTS[variant])
    if reason := PEERS[name].absent("cpu"):
        pytest.skip(reason)
    if reason := PEERS[name].refuses(case):
        pytest.skip(f"{name} {reason}")
    problem = make_problem(case).in_rows()
    exact = exact_step(problem)
    assert exact.loss_bound < 1e-3, "a bound this loose would hide a mistake"
    if PEERS[name].takes_pairs:
        assert_pairs_are_their_rows(PEERS[name](), problem, exact)
        return
    for setting in PEERS[name].settings(case):
        problem.clear_gradients()
        peer = PEERS[name](**setting)
        outcome = peer.run(problem)
        assert abs(outcome.loss.item() - exact.loss) <= exact.loss_bound, setting
        assert_within("sequence_logps", outcome.sequence_logps, exact.logps, exact.logps_bound)
        tokens = peer.token_logps(problem, outcome)
        if tokens is not None:
            assert_within("token_logps", problem.sum_sequences(tokens), exact.logps, exact.logps_bound)
        hidden = problem.scored(problem.hidden.grad)
        assert_within("hidden", hidden, exact.gradients["hidden"], exact.gradient_bounds["hidden"])
        assert problem.hidden.grad[problem.targets == IGNORE_INDEX].count_nonzero() == 0
        if case.frozen:
            assert problem.weight.grad is None
        else:
            assert_within("weight", problem.weight.grad, exact.gradients["weight"], exact.gradient_bounds["weight"])


def assert_pairs_are_their_rows(peer: Peer, rows: Problem, exact: Exact) -> None:
    """Of answers that are there once; the gradient of each is the sum over its copies."""
    problem = rows.original
    assert problem.targets.shape == (6, 12) and rows.targets.shape == (12, 12)
    outcome = peer.run(problem)
    assert abs(outcome.loss.item() - exact.loss) <= exact.loss_bound
    assert_within("sequence_logps", outcome.sequence_logps, exact.logps, exact.logps_bound)
    tokens = problem.sum_sequences(peer.token_logps(problem, outcome))[problem.members]
    assert_within("token_logps", tokens, exact.logps, exact.logps_bound)
    expected, bound = (over_copies(rows, of_rows["hidden"]) for of_rows in (exact.gradients, exact.gradient_bounds))
    assert_within("hidden", problem.scored(problem.hidden.grad), expected, bound)
    assert_within("weight", problem.weight.grad, exact.gradients["weight"], exact.gradient_bounds["weight"])


def over_copies(rows: Problem, values: Tensor) -> Tensor:
    """[scored, H] of the rows, summed by the sequence and the position that each is a copy of: [scored, H] of those."""
    if rows.original is None:
        return values
    at = (rows.targets.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
    length, members = rows.case.length, torch.tensor(rows.case.members)
    found = values.new_zeros(rows.case.sequences * length, values.shape[1])
    found.index_add_(0, members[at // length] * length + at % length, values)
    return rows.original.scored(found.view(-1, length, values.shape[1]))


@pytest.mark.parametrize("variant", VARIANTS)
def test_truth_is_autograds(variant, monkeypatch):
    monkeypatch.setattr("loss_layer.truth._CHUNK_BYTES", 8 * 72 * 7)  # several chunks, the last one short
    problem = make_problem(small_case(**VARIANTS[variant]))
    rows = problem.in_rows()
    truth, exact = compute_truth(problem, BETA), exact_step(rows)
    assert truth.loss == pytest.approx(exact.loss, rel=1e-12)
    torch.testing.assert_close(truth.sequence_logps, exact.logps, rtol=1e-12, atol=0)
    grad_hidden = over_copies(rows, exact.gradients["hidden"])[truth.sampled_tokens]
    torch.testing.assert_close(truth.grad_hidden, grad_hidden, rtol=1e-9, atol=0)
    if problem.case.frozen:
        assert truth.grad_weight is None
    else:
        expected = exact.gradients["weight"][truth.sampled_rows]
        torch.testing.assert_close(truth.grad_weight, expected, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("variant", ["no prompt", "answers"])
def test_errors_are_seen(variant):
    problem = make_problem(small_case(**VARIANTS[variant]))
    truth = compute_truth(problem, BETA)
    problem = problem.in_rows()
    outcome = PEERS["full-logits"]().run(problem)
    right = errors(truth, problem, outcome)
    problem.hidden.grad *= 1.01
    problem.weight.grad *= 1.02
    outcome.loss *= 1.03
    outcome.token_logps[0] += 0.5
    wrong = errors(truth, problem, outcome)
    assert max(value for value in right.values() if isinstance(value, float)) < 1e-5
    assert wrong["grad_hidden"] == pytest.approx(0.01, rel=1e-3)
    assert wrong["grad_weight"] == pytest.approx(0.02, rel=1e-3)
    assert wrong["loss"] == pytest.approx(0.03, rel=1e-3)
    assert wrong["logps"] == pytest.approx(0.5 / (1 - truth.token_logps[0].item()), rel=1e-3)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_prompts_take_their_share(name, share):
    case = named_case(name, "cuda", prompt_share=share)
    assert all(0 <= prompt < case.length for prompt in case.prompt_lengths)
    assert case.scored_tokens == pytest.approx(case.tokens * (1 - share), rel=0.03)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_rows_are_copies_of_answers(share):
    case = small_case(answers=4, pairs=2 * pairs_of(4), prompt_share=share)
    assert (case.prompts, case.sequences, case.tokens) == (2, 8, 24 * 12)
    problem = make_problem(case)
    rows = problem.in_rows()
    assert len(rows.scored(rows.targets)) == case.scored_tokens
    assert len(problem.scored(problem.targets)) == case.distinct_scored_tokens == case.scored_tokens / 3
    chosen, rejected = torch.tensor(case.members).chunk(2)
    assert {*zip(chosen.tolist(), rejected.tolist(), strict=True)} == {
        (4 * prompt + a, 4 * prompt + b) for prompt in range(2) for a in range(4) for b in range(a + 1, 4)
    }
    for row, sequence in enumerate(case.members):
        assert torch.equal(rows.hidden[row], problem.hidden[sequence])
        assert (rows.targets[row] == IGNORE_INDEX).sum() == case.row_prompts[row]


def test_inputs_are_a_trained_models(tmp_path):
    """Half of the targets likely, half not; the loss near ln 2; and files keep all of it."""
    problem = make_problem(small_case(vocab_size=4_096, hidden_size=256))
    truth = compute_truth(problem, BETA)
    assert 0.2 < truth.token_logps.exp().median() < 0.9
    assert 1e-5 < abs(truth.loss - math.log(2)) < 0.3
    save_problem(problem, tmp_path / "problem.pt")
    loaded = load_problem(tmp_path / "problem.pt", "cpu")
    assert loaded.case == problem.case
    assert loaded.hidden.requires_grad and loaded.weight.requires_grad
    torch.testing.assert_close(compute_truth(loaded, BETA).sequence_logps, truth.sequence_logps)


PEER_FILE = """
import os, signal
from loss_layer.ours import FastDPO
from loss_layer.peer import Peer

class Raises(FastDPO):
    name = "raises"
    def run(self, problem):
        raise RuntimeError("no luck\\nmore of it")

class Dies(FastDPO):
    name = "dies"
    def run(self, problem):
        os.kill(os.getpid(), signal.SIGKILL)

class Nowhere(Peer):
    name = "nowhere"
    package = "a-package-that-nobody-has"

class Picky(Peer):
    name = "picky"
    @classmethod
    def refuses(cls, case):
        return "wants other cases"
"""


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


def test_a_quick_run_from_end_to_end(tmp_path):
    peer_file, out = tmp_path / "more.py", tmp_path / "out.json"
    peer_file.write_text(PEER_FILE)
    peers = "floor,fastdpo,raises,dies,nowhere,picky"
    arguments = ["--device", "cpu", "--threads", "1", "--peer_file", str(peer_file), "--peers", peers]
    done = run_script("--quick", "--pairs", "1", "--length", "8", *arguments, "--json", str(out))
    assert done.returncode == 0, done.stderr

    lines = done.stdout.splitlines()
    assert any(line.startswith("tiny: H 128, V 4,096, 16 tokens in 1 pair, 12 scored, float32") for line in lines)
    rows = {line.split()[0]: line.split() for line in lines if line.split()}
    assert len(rows["fastdpo"]) == 9 and float(rows["fastdpo"][5]) < 1e-5
    assert "raises: FAILED: RuntimeError: no luck" in lines
    assert "dies: FAILED: killed by signal 9 (out of memory?)" in lines
    assert "nowhere: absent: a-package-that-nobody-has is not installed" in lines
    assert "picky: not measured: wants other cases" in lines
    assert "round 1 of 1, fastdpo" in done.stderr

    report = json.loads(out.read_text())
    assert set(report) == {"command", "commit", "machine", "versions", "build_info", "cases", "sweeps"}
    assert report["versions"]["torch"] == torch.__version__ and report["machine"]["threads"] == 1
    (case,) = report["cases"]
    assert case["products"] == 4 and case["flops"] == 2 * 4 * 12 * 128 * 4_096
    own = case["peers"]["fastdpo"]
    assert own["status"] == "measured" and len(own["rounds"]) == 1
    assert own["seconds"] > 0 and own["ratio_to_fastdpo"] == 1 and own["ratio_to_floor"] > 0
    assert set(own["errors"]) == {"logps", "logps_of", "loss", "grad_hidden", "grad_weight"}
    assert case["peers"]["raises"]["status"] == "failed"


def test_the_peer_that_keeps_every_exponential():
    peer, case = PEERS["fastdpo-most-memory"], named_case("qwen2.5-0.5b", "cuda")
    assert peer.refuses(case) is None
    assert peer.settings(case) == [{"workspace": case.scored_tokens * 151_936 * 2}]
    assert peer.refuses(dataclasses.replace(case, frozen=True)) == "nothing is kept for a weight without a gradient"
    assert peer.refuses(small_case()) == "the default keeps all of them"


def test_the_commit_that_results_name(tmp_path, monkeypatch):
    """Results that are written again are no change of what wrote them."""
    monkeypatch.setattr(machine, "__file__", str(tmp_path / "bench" / "common" / "machine.py"))
    monkeypatch.setenv("FASTDPO_COMMIT", "of elsewhere")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert machine.commit() == "of elsewhere"

    def git(*arguments: str) -> str:
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", tmp_path, *name, *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    script, results = tmp_path / "bench" / "common" / "machine.py", tmp_path / "bench" / "results" / "a.json"
    results.parent.mkdir(parents=True)
    script.parent.mkdir()
    for file in (script, results):
        file.write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    head = git("rev-parse", "HEAD")
    assert machine.commit() == head
    results.write_text("2")
    (tmp_path / "new.json").write_text("3")
    assert machine.commit() == head
    script.write_text("2")
    assert machine.commit() == head + "+"


def test_wrong_flags_are_named():
    done = run_script("--peers", "fastdpo,slowdpo")
    assert done.returncode == 2 and "--peers names 'slowdpo'; it may name floor, fastdpo, " in done.stderr
    of_answers = (["--answers", "1"], ["--answers", "4", "--pairs", "8"], ["--prompts", "2"])
    of_sweeps = (["--points", "512"], ["--answers", "4", "--sweep", "tokens"], ["--sweep", "answers", "--pairs", "4"])
    for arguments in (["--case", "huge"], ["--prompt_share", "1"], ["--rounds", "0"], *of_answers, *of_sweeps):
        with pytest.raises(SystemExit, match="2"):
            run.parse_arguments(arguments)


def test_answers_change_a_case():
    args = run.parse_arguments(["--case", "tiny", "--device", "cpu", "--answers", "4", "--prompts", "3"])
    case = run.make_case("tiny", args)
    assert (case.answers, case.pairs, case.sequences) == (4, 18, 12)
    assert PEERS["fastdpo-pairs"].refuses(case) is None
    assert PEERS["fastdpo-pairs"].refuses(named_case("tiny", "cpu")) == "no answer is of two pairs"
    cases = run.sweep_cases("answers", named_case("tiny", "cpu"), [2, 3, 8], None)
    assert [(one.answers, one.pairs) for one in cases] == [(2, 2), (3, 6), (8, 56)]


@pytest.fixture
def fake_jobs(monkeypatch) -> list[tuple[str | None, dict[str, Any]]]:
    """In place of processes: figures that follow from peer and setting. Returns what was asked for."""
    asked: list[tuple[str | None, dict[str, Any]]] = []

    def answer(self: runner.Jobs, peer: str | None, setting: dict[str, Any]) -> dict[str, Any]:
        asked.append((peer, setting))
        if peer is None:
            return {}
        if setting.get("chunk_size") == 8_192:
            return {"failed": "RuntimeError: not this size"}
        slow = sum(name == peer for name, _ in asked)  # each round slower than the one before
        seconds = {"floor": 1, "fastdpo": 2, "trl": 4, "fastdpo-pairs": 1}[peer]
        return {"seconds": slow * seconds, "peak_bytes": 10**6, "errors": None}

    monkeypatch.setattr(runner.Jobs, "run", answer)
    return asked


def options(**changes: Any) -> runner.Options:
    given = {"peers": ["floor", "fastdpo", "trl"], "rounds": 3, "errors": False, "tune": False, "threads": None}
    return runner.Options(**given | {"peer_file": None, "timeout": 60} | changes)


def test_rounds_take_the_peers_in_turn(fake_jobs):
    found = runner.run_case(named_case("small", "cpu"), options(), lambda _: None)
    assert [peer for peer, _ in fake_jobs] == [None, *["floor", "fastdpo", "trl"] * 3]
    assert [entry["seconds"] for entry in found["peers"].values()] == [2, 4, 8]
    assert found["peers"]["trl"]["ratio_to_floor"] == 4 and found["peers"]["trl"]["ratio_to_fastdpo"] == 2
    assert "trl      8,000     4.00       2.00  1.0" in case_table(found)


def test_the_fastest_setting_that_works_is_kept(fake_jobs):
    found = runner.run_case(named_case("small", "cpu"), options(tune=True, peers=["trl"]), lambda _: None)
    trl = found["peers"]["trl"]
    assert [one["setting"]["chunk_size"] for one in trl["tried"]] == [32_000, 8_192, 2_048]
    assert trl["tried"][1]["failed"] == "RuntimeError: not this size"
    assert trl["setting"] == {"chunk_size": 32_000} and len(trl["rounds"]) == 3


def test_sweeps_are_printed_and_drawn(fake_jobs, tmp_path):
    case = named_case("small", "cpu")
    sweeps = {}
    for axis, values in (("tokens", [512, 1_024]), ("vocabulary", [8_192, 32_768])):
        cases = run.sweep_cases(axis, case, values, None)
        sweeps[axis] = [runner.run_case(one, options(rounds=1), lambda _: None) for one in cases]
    assert [point["tokens"] for point in sweeps["tokens"]] == [512, 1_024]
    assert {point["tokens"] for point in sweeps["vocabulary"]} == {2_048}
    text = sweep_tables("tokens", sweeps["tokens"])
    assert "microseconds per token\ntokens     512  1,024\nfloor    1,953  1,953\n" in text
    plot_sweeps(sweeps, "a machine", tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_over_answers(fake_jobs, tmp_path):
    cases = run.sweep_cases("answers", named_case("small", "cpu"), [2, 4], None)
    how = options(rounds=1, peers=["floor", "fastdpo", "fastdpo-pairs"])
    sweeps = {"answers": [runner.run_case(one, how, lambda _: None) for one in cases]}
    text = sweep_tables("answers", sweeps["answers"])
    assert "small" not in text and "256 tokens a row, all pairs of the answers to each of 2 prompts" in text
    assert text.split("\n\n")[1].splitlines() == [
        "scored tokens",
        "answers                 2      4",
        "pairs                   2     12",
        "of the pairs' rows  1,024  6,144",
        "each answer once    1,024  2,048",
    ]
    assert "per token, each answer once\n" in text and "fastdpo-pairs: not measured: no answer is of two pairs" in text
    assert "fastdpo-pairs      -  1,000" in text and "fastdpo-pairs      -    488" in text
    said = "4 answers to each of 2 prompts, every two a pair: 2,048 scored tokens with each answer once"
    table = case_table(sweeps["answers"][1])
    assert "6,144 tokens in 12 pairs, 6,144 scored, float32" in table and said in table
    plot_sweeps(sweeps, "a machine", tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_cost_of_outputs_from_end_to_end(tmp_path, capsys):
    out = tmp_path / "out.json"
    arguments = ["--case", "tiny", "--pairs", "1", "--length", "8", "--device", "cpu", "--rounds", "2"]
    outputs.main([*arguments, "--json", str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert "tiny: H 128, V 4,096, 16 tokens, float32" in lines
    names = list(outputs.VARIANTS)
    assert {"all", "none", *OUTPUTS} < set(names)
    assert [line.split("  ")[0] for line in lines[-9:-1]] == ["", *names]
    report = json.loads(out.read_text())
    assert set(report) == {"command", "commit", "machine", "versions", "build_info", "cases"}
    assert report["machine"]["threads"] == 1
    for found in report["cases"][0]["passes"].values():
        assert found["seconds"] > 0 and list(found["extra"]) == names
        assert [len(rounds) for rounds in found["rounds"].values()] == [2] * 7


def test_outputs_are_compared_with_the_calls_without():
    """Where others disturb every second round."""
    cost = {(): 1.0, ("entropy",): 1.1, tuple(OUTPUTS): 1.5}
    asked: list[tuple[str, ...]] = []

    def seconds(_: Problem, wanted: tuple[str, ...]) -> float:
        asked.append(wanted)
        disturbed = ((len(asked) - 1) // len(outputs.VARIANTS)) % 2
        return cost.get(wanted, 1.0) * (3 if disturbed else 1)

    found = outputs.measure(None, seconds, rounds=4)
    assert found["seconds"] == 1
    assert found["extra"] == pytest.approx(dict.fromkeys(outputs.VARIANTS, 0.0) | {"entropy": 0.1, "all": 0.5})


@pytest.mark.slow
def test_quick_measures_every_installed_peer(tmp_path):
    done = run_script("--quick", "--device", "cpu", "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    entries = json.loads((tmp_path / "out.json").read_text())["cases"][0]["peers"]
    assert {entry["status"] for entry in entries.values()} <= {"measured", "absent"}
    worst = max(entry["errors"]["grad_weight"] for entry in entries.values() if entry.get("errors"))
    assert worst < 1e-4
