"""token_logps(group=...) sends what its docstring says, and no more."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from traffic import Traffic

from fastdpo import token_logps
from fastdpo.logps import OUTPUTS

RANKS, TOKENS, IGNORED, HIDDEN, VOCABULARY = 2, 12, 5, 16, 40
SCORED = TOKENS - IGNORED
WITHOUT_GRADIENT = "no gradient"
# What is asked for, and what needs a gradient.
CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "all gradients": ((), ("hidden", "weight", "bias")),
    "frozen head": ((), ("hidden",)),
    "head alone": ((), ("weight",)),
    WITHOUT_GRADIENT: ((), ()),
    **{f"with {name}": ((name,), ("hidden", "weight")) for name in OUTPUTS},
    "with all outputs": (tuple(OUTPUTS), ("hidden", "weight")),
}


def sent_by(dtype: torch.dtype) -> dict[str, Any]:
    """name -> what a rank gave to the forward's collectives, and to the backward's."""
    rank = dist.get_rank()
    found = {}
    for name, (outputs, trained) in CASES.items():
        torch.manual_seed(0)
        whole = {
            "hidden": torch.randn(TOKENS, HIDDEN, dtype=dtype),
            "weight": torch.randn(VOCABULARY, HIDDEN, dtype=dtype).chunk(RANKS)[rank].clone(),
            "bias": torch.randn(VOCABULARY, dtype=dtype).chunk(RANKS)[rank].clone(),
        }
        inputs = {key: x.requires_grad_(key in trained) for key, x in whole.items()}
        targets = torch.randint(VOCABULARY, (TOKENS,))
        targets[:IGNORED] = -100
        with Traffic() as forward:
            logps = token_logps(**inputs, targets=targets, outputs=outputs, group=dist.group.WORLD).logps
        with Traffic() as backward:
            if trained:
                logps.sum().backward()
        found[name] = [(dict(t.calls), sum(t.sent.values())) for t in (forward, backward)]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_head_sends_what_its_docstring_says(dtype: torch.dtype, tmp_path: Path) -> None:
    compute = torch.promote_types(dtype, torch.float32).itemsize
    for of_rank in on_ranks(partial(sent_by, dtype), RANKS, tmp_path):
        for name, ((calls, sent), (calls_back, sent_back)) in of_rank.items():
            outputs, trained = CASES[name]
            # How many entries a rank has, and then the rows.
            assert calls == {"allgather_": 2}, name
            per_token = (sent - 8) / SCORED
            assert 16 + 8 * len(outputs) <= per_token <= 16 + 16 * len(outputs), name
            if "hidden" in trained:
                assert calls_back == {"allreduce_": 1}, name
                assert sent_back == SCORED * HIDDEN * compute, name
            else:
                assert calls_back == {} and sent_back == 0, name
