"""Optimisers of ``--optim`` in 8 bits: trained, watched, saved, and resumed to the unbroken run's bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from broken_runs import id_rows, losses, run
from tiny_models import make_model
from trainer_runs import config

from fastdpo.errors import DivergedError
from fastdpo.trainer import DPOTrainer
from fastdpo.trainer import optimizers as optimizers_module

pytestmark = [
    pytest.mark.usefixtures("one_thread", "quiet_and_uncached"),
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU"),
]

ROWS = id_rows(8, 384)
OPTIMIZERS = ("adamw_8bit", "paged_adamw_8bit", "lion_8bit", "ademamix_8bit", "rmsprop_bnb_8bit")


def model() -> torch.nn.Module:
    # Matrices of 4,096 numbers and more, which are what is kept in 8 bits.
    return make_model("llama", hidden_size=64, intermediate_size=96)


def states_of(trainer: DPOTrainer) -> dict[tuple[int, str], Any]:
    """What the optimiser holds for each parameter, and for which."""
    optimizer = trainer.optimizer.optimizer  # accelerate's is around it
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {(i, name): value for i, p in enumerate(parameters) for name, value in optimizer.state[p].items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_is_the_unbroken_one(name: str, tmp_path: Path) -> None:
    options = {"optim": name, "learning_rate": 1e-3}
    expected = run(tmp_path / "unbroken", model, ROWS, **options)
    states = states_of(expected)
    assert any(value.dtype == torch.uint8 for value in states.values() if torch.is_tensor(value))
    got = run(tmp_path / "resumed", model, ROWS, str(tmp_path / "unbroken" / "checkpoint-2"), **options)
    ours, theirs = got.model.state_dict(), expected.model.state_dict()
    assert [name for name, value in theirs.items() if not torch.equal(ours[name], value)] == []
    found = states_of(got)
    assert found.keys() == states.keys()
    assert [
        name for name, value in states.items() if not torch.equal(*map(torch.as_tensor, (found[name], value)))
    ] == []
    assert losses(got) == losses(expected) and len(losses(got)) == 4 and losses(got)[3] != losses(got)[0]


def test_a_run_that_diverges_stops_before_its_state_is_saved(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="not finite"):
        run(tmp_path, model, ROWS, optim="adamw_8bit", learning_rate=1e30, max_grad_norm=0.0)


@pytest.mark.parametrize(
    ("name", "package", "by_pip"),
    [
        ("adamw_8bit", "bitsandbytes", "bitsandbytes"),
        ("adamw_torch_8bit", "torchao", "torchao"),
        ("lion_32bit", "bitsandbytes", "bitsandbytes"),
        ("galore_adamw_8bit", "galore_torch", "galore-torch"),
        ("apollo_adamw_layerwise", "apollo_torch", "apollo-torch"),
        ("adalomo", "lomo_optim", "lomo-optim"),
        ("schedule_free_adamw", "schedulefree", "schedulefree"),
        ("stable_adamw", "optimi", "torch-optimi"),
    ],
)
def test_what_is_not_installed_is_said_in_a_line_and_first(
    name: str, package: str, by_pip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers_module, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=f"^optim is '{name}', which needs {package}: pip install {by_pip}$"):
        DPOTrainer(model(), args=config(tmp_path, optim=name), train_dataset=ROWS)


def test_others_need_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers_module, "find_spec", lambda _: None)
    for name in ("adamw_torch_fused", "adamw_torch", "sgd", "adafactor"):
        optimizers_module.check_optimizer_is_there(config(tmp_path, optim=name))
