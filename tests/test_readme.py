"""What the README shows under "Drop it in", run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdpo.logps import oracle as reference
from fastdpo.loss.oracle import losses_of_sequences

README = Path(__file__).parents[1] / "README.md"


def snippets() -> dict[str, str]:
    """The section's Python, by the module that a snippet imports its drop-in from and the first name."""
    section = re.search(r"^## Drop it in$(.*?)^## ", README.read_text(encoding="utf-8"), re.M | re.S)[1]
    codes = re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)
    names = [re.search(r"^(?:from|import) (fastdpo\S*)(?: import (\w+))?", code, re.M) for code in codes]
    return {".".join(filter(None, name.groups())): code for name, code in zip(names, codes, strict=True)}


FIRST = "fastdpo.dpo_loss"  # whose tensors the others go on with
TRL = "fastdpo.integrations.trl"


def run(*names: str) -> dict[str, Any]:
    """What is defined after the snippets."""
    torch.manual_seed(0)
    defined: dict[str, Any] = {}
    for name in names:
        exec(compile(snippets()[name], f"{README}: {name}", "exec"), defined)
    return defined


def test_drop_in_snippets_are_all_there() -> None:
    assert list(snippets()) == [
        FIRST,
        "fastdpo.preference_loss",
        "fastdpo.token_logps",
        TRL,
        "fastdpo.integrations.liger.LigerFusedLinearDPOLoss",
        "fastdpo.integrations.dpo_authors.batch_logps",
        "fastdpo.integrations.torchtune.DPOLoss",
    ]


def test_drop_in_first_snippet_has_the_loss_and_gradients_of_full_logits() -> None:
    names = run(FIRST)
    hidden, weight = (names[name].detach().double().requires_grad_() for name in ("hidden", "weight"))
    policy = reference.token_logps(hidden, weight, names["targets"]).logps.sum(1)
    ref = reference.token_logps(names["ref_hidden"].double(), names["ref_weight"].double(), names["targets"])
    loss = losses_of_sequences(policy, ref.logps.sum(1), beta=0.1).mean()
    loss.backward()
    torch.testing.assert_close(names["output"].loss.double(), loss, rtol=1e-5, atol=1e-4)
    for name, exact in (("hidden", hidden.grad), ("weight", weight.grad)):
        assert (names[name].grad.double() - exact).norm() <= 1e-4 * exact.norm()


@pytest.mark.parametrize("name", [name for name in snippets() if name != TRL])
def test_drop_in_snippet_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    run(*dict.fromkeys((FIRST, name)))
    assert "assert " in snippets()[name] or capsys.readouterr().out


def test_drop_in_snippet_of_trl_takes_effect() -> None:
    import trl.trainer.utils as trl_utils

    from fastdpo.integrations import trl

    before = trl_utils._ChunkedLogProbFunction
    try:
        run(TRL)
        assert trl_utils._ChunkedLogProbFunction.__module__ == "fastdpo.integrations.trl"
    finally:
        trl.disable()
    assert trl_utils._ChunkedLogProbFunction is before
