from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_models import make_model

from fastdpo.model import precision
from fastdpo.model.precision import in_float32

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def test_weights_in_16_bits_are_widened_and_put_back_to_the_bit():
    model = make_model("llama", dtype=torch.bfloat16)
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    ids = torch.arange(5)[None]
    with pytest.raises(RuntimeError, match="stop"), in_float32(model, CPU, torch.bfloat16) as dtype, torch.no_grad():
        assert dtype == torch.float32
        assert model(ids).logits.dtype == torch.float32
        raise RuntimeError("stop")
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_without_memory_or_with_quantised_weights_all_stays(monkeypatch):
    model = make_model("llama", dtype=torch.bfloat16)
    monkeypatch.setattr(precision, "_has_room", lambda *_: False)
    with in_float32(model, CPU, torch.bfloat16) as dtype:
        assert (dtype, model.dtype) == (torch.bfloat16, torch.bfloat16)
    model = make_model("llama")
    model.is_quantized = True
    with in_float32(model, CPU, torch.bfloat16) as dtype:
        assert dtype == torch.bfloat16


@pytest.fixture
def accelerate_anew() -> Iterator[None]:
    """Accelerate keeps the first precision of a process; here and afterwards it takes the one that is asked for."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("accelerate_anew")
def test_autocast_is_off_also_where_accelerate_put_it():
    model = make_model("llama")
    ids = torch.arange(5)[None]
    with torch.no_grad():
        true = model(ids).logits
        prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model, evaluation_mode=True)
        around = prepared.forward
        assert not torch.equal(prepared(ids).logits, true)
        with torch.autocast("cpu", torch.bfloat16), in_float32(prepared, CPU, torch.bfloat16) as dtype:
            assert torch.equal(prepared(ids).logits, true)
            assert dtype == torch.float32
    assert prepared.forward is around
