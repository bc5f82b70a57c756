"""Every Python snippet of the README and of docs/ runs, and does what its page says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from loss_layer.cases import named_case
from loss_layer.peers import PEERS
from pages import CONTRIBUTING, GUIDES, README, SHOWN, blocks, name_of, text_of

import fastdpo
from fastdpo.logps import oracle as reference
from fastdpo.loss import objectives, oracle
from fastdpo.loss.objectives import OBJECTIVES
from fastdpo.loss.oracle import losses_of_sequences

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")


@pytest.fixture
def trl_as_it_was() -> Iterator[None]:
    yield
    from fastdpo.integrations import trl

    trl.disable()


def run(page: Path) -> dict[str, Any]:
    """What is defined after the page's snippets, which go on from one another."""
    torch.manual_seed(0)
    defined: dict[str, Any] = {"__name__": "snippet"}
    for number, code in enumerate(blocks(page, "python"), 1):
        exec(compile(code, f"{name_of(page)}, snippet {number}", "exec"), defined)
    return defined


@pytest.mark.usefixtures("workplace", "trl_as_it_was")
@pytest.mark.parametrize("page", [page for page in SHOWN if blocks(page, "python")], ids=name_of)
def test_snippets_run(page: Path) -> None:
    run(page)


def test_every_way_in_is_shown() -> None:
    code = "\n".join(code for page in SHOWN for code in blocks(page, "python"))
    for name in ("dpo_loss", "preference_loss", "token_logps", "DPOTrainer", "FusedHead", "LigerFusedLinearDPOLoss"):
        assert re.search(rf"^from fastdpo.* import .*\b{name}\b", code, re.M), name
    for module in ("trl", "liger", "dpo_authors", "torchtune"):
        assert f"fastdpo.integrations.{module}" in code


@pytest.mark.usefixtures("trl_as_it_was")
@pytest.mark.parametrize(
    ("page", "loss_of"),
    [(README, lambda names: names["output"].loss), (GUIDES / "trl-liger.md", lambda names: names["loss"])],
    ids=["dpo_loss", "Liger's"],
)
def test_a_drop_in_has_the_loss_and_gradients_of_full_logits(page: Path, loss_of: Any) -> None:
    names = run(page)
    hidden, weight = (names[name].detach().double().requires_grad_() for name in ("hidden", "weight"))
    policy = reference.token_logps(hidden, weight, names["targets"]).logps.sum(1)
    ref = reference.token_logps(names["ref_hidden"].double(), names["ref_weight"].double(), names["targets"])
    loss = losses_of_sequences(policy, ref.logps.sum(1), beta=0.1).mean()
    loss.backward()
    torch.testing.assert_close(loss_of(names).double(), loss, rtol=1e-5, atol=1e-4)
    for name, exact in (("hidden", hidden.grad), ("weight", weight.grad)):
        assert (names[name].grad.double() - exact).norm() <= 1e-4 * exact.norm()


def test_the_guide_begins_with_the_readmes_drop_in() -> None:
    assert blocks(GUIDES / "own-loop.md", "python")[0] == blocks(README, "python")[0]


def test_trls_line_takes_effect() -> None:
    import trl.trainer.utils as trl_utils

    from fastdpo.integrations import trl

    before = trl_utils._ChunkedLogProbFunction
    try:
        run(GUIDES / "trl-liger.md")
        assert trl_utils._ChunkedLogProbFunction.__module__ == "fastdpo.integrations.trl"
    finally:
        trl.disable()
    assert trl_utils._ChunkedLogProbFunction is before


def test_the_loss_that_contributing_adds_is_its_oracles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its functions, as they stand there, in the modules that it says."""
    of_oracle, of_objectives = (code for code in blocks(CONTRIBUTING, "python") if "def _dpop" in code)
    ours, theirs = dict(vars(objectives)), dict(vars(oracle))
    exec(of_objectives, ours)
    exec(of_oracle, theirs)
    monkeypatch.setitem(oracle._PAIRWISE, "dpop", theirs["_dpop"])
    logps = -20 * torch.rand(4, 50, dtype=torch.float64)
    assert (logps[0] < logps[2]).any() and (logps[0] > logps[2]).any()  # on both sides of the penalty
    for options in ({}, {"dpop_lambda": 50.0}):
        expected = losses_of_sequences(logps[:2].flatten(), logps[2:].flatten(), beta=0.3, loss_type="dpop", **options)
        torch.testing.assert_close(ours["_dpop"](pairs_of(logps), beta=0.3, **options), expected)
    dpo = fastdpo.preference_loss(*logps, beta=0.3)[0]
    torch.testing.assert_close(ours["_dpop"](pairs_of(logps), beta=0.3, dpop_lambda=0.0), dpo)
    row = re.search(r'^"dpop": (Objective\(.*\)),$', text_of(CONTRIBUTING), re.M)[1]
    assert {"dpop_lambda", *OBJECTIVES["hinge"].options} == set(eval(row, ours).options)


def pairs_of(logps: torch.Tensor) -> objectives.Pairs:
    chosen, rejected, ref_chosen, ref_rejected = logps
    ratios = (chosen - ref_chosen, rejected - ref_rejected)
    return objectives.Pairs(*ratios, chosen, rejected, ref_chosen, ref_rejected, -chosen, None, None, None)


def test_the_peer_that_contributing_adds_computes_what_another_does(mine: str) -> None:
    exec(mine, {"__name__": "mine"})
    for name in ("tiny", "gemma-2-2b"):  # without a softcap, and with one
        case = named_case(name, "cpu")
        found = []
        for peer in ("full-logits", "logsumexp"):
            torch.manual_seed(0)
            hidden, weight = torch.randn(5, 16, requires_grad=True), torch.randn(70, 16, requires_grad=True)
            logps = PEERS[peer]().logps(hidden, weight, torch.randint(0, 70, (5,)), case)
            found.append([logps, *torch.autograd.grad(logps.square().sum(), (hidden, weight))])
        torch.testing.assert_close(*found)
