"""What optimisers keep: the same number of bytes as the real ones hold after a step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.optim import GlobalOptimManager
from torch import nn
from transformers import Trainer, TrainingArguments

from fastdpo.plan.optimizers import KNOWN, state_bytes, step_bytes

_SHAPES = ((64, 128), (300, 40), (10,), (4096,))
# Tables of 256 numbers that all parameters share, and counters.
_SMALL = 2 * 256 * 4 + 64 * len(_SHAPES)


@pytest.fixture(autouse=True)
def no_overrides() -> None:
    """bitsandbytes has one manager in a process, which knows an earlier optimiser's parameters by number."""
    GlobalOptimManager.get_instance().initialize()


def held_by(optimizer: Any) -> int:
    storages: dict[int, int] = {}
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                storages[value.untyped_storage().data_ptr()] = value.numel() * value.element_size()
    return sum(storages.values())


# Those of torchao are not installed; adafactor of 16-bit weights keeps what it keeps of float32 ones.
_REAL = [name for name in KNOWN if name not in ("adamw_torch_8bit", "adamw_torch_4bit")]
_CASES = [(name, torch.float32) for name in _REAL] + [(name, torch.bfloat16) for name in _REAL if name != "adafactor"]


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(("name", "dtype"), _CASES, ids=str)
def test_states_are_as_large_as_real_ones(name: str, dtype: torch.dtype, tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.ParameterList([nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in _SHAPES])
    kind, options = Trainer.get_optimizer_cls_and_kwargs(TrainingArguments(str(tmp_path), optim=name, use_cpu=True))
    optimizer = kind(model.parameters(), **options)
    for parameter in model:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    expected = held_by(optimizer)
    got = state_bytes(name, [(parameter.shape, parameter.dtype) for parameter in model])
    assert 0 <= expected - got <= _SMALL, (expected, got)


def test_a_step_of_all_at_once_needs_more() -> None:
    parameters = [(torch.Size(shape), torch.float32) for shape in _SHAPES]
    assert step_bytes("adamw_torch_fused", parameters, all_at_once=True) == 0
    one, all_of_them = (step_bytes("adamw_torch", parameters, all_at_once=at_once) for at_once in (False, True))
    assert one == 2 * 300 * 40 * 4 and all_of_them == sum(shape.numel() for shape, _ in parameters) * 4


def test_others_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="optim is 'galore_adamw'.*known are adamw_torch, "):
        state_bytes("galore_adamw", [])
