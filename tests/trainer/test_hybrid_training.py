"""A model whose kernels keep sequences apart trains in packed rows as it does in padded ones."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from broken_runs import id_rows, losses, run
from kernels_in_torch import install_kernels
from tiny_families import VOCABULARY, make_family

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")


@pytest.mark.parametrize(
    ("model_type", "gradient_checkpointing"), [("bamba", True), ("qwen3_next", False)], ids=["checkpointing", ""]
)
def test_the_same_steps_as_in_padded_rows(tmp_path: Path, monkeypatch, model_type: str, gradient_checkpointing: bool):
    # Without a load-balancing loss, which is of all tokens, padding among them.
    make = partial(make_family, model_type, trained=True)
    install_kernels(monkeypatch, make())
    options = {
        "router_aux_loss_coef": None if model_type == "bamba" else 0.0,
        "gradient_checkpointing": gradient_checkpointing,
        "save_strategy": "no",
        "learning_rate": 1e-4,
    }
    packed, padded = (
        run(tmp_path / packing, make, id_rows(8, VOCABULARY), packing=packing, **options)
        for packing in ("auto", "padded")
    )
    assert packed.packing.layout == "repeated"
    assert losses(packed) == pytest.approx(losses(padded), abs=1e-4)
    assert losses(packed)[-1] != losses(packed)[0]
    for name, p in padded.model.named_parameters():
        torch.testing.assert_close(dict(packed.model.named_parameters())[name], p, rtol=0, atol=1e-4, msg=name)
