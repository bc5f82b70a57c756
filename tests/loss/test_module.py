"""DPOLoss is dpo_loss."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from loss_batches import make_batch

from fastdpo import DPOLoss, dpo_loss
from fastdpo.loss.module import DPOLossInputs, DPOLossKeywords
from fastdpo.loss.options import LossKeywords


def test_module_is_the_function() -> None:
    batch = make_batch(9, 3, 9, 16, 200, torch.float32, softcap=5.0, logit_scale=0.5)
    options = {"beta": 0.3, "loss_type": ["ipo", "sft"], "ipo_reduction": "sum", "outputs": ["entropy"]}
    arguments = {"bias": batch.bias, "ref_hidden": batch.ref_hidden, "ref_weight": batch.ref_weight}
    module = DPOLoss(**options, **batch.model)
    output = module(batch.hidden, batch.weight, batch.targets, **arguments)
    expected = dpo_loss(**batch.policy(), **{k: arguments[k] for k in ("ref_hidden", "ref_weight")}, **options)
    assert torch.equal(output.loss, expected.loss) and torch.equal(output.entropy, expected.entropy)
    assert "beta=0.3, loss_type=['ipo', 'sft']" in repr(module)
    with pytest.raises(ValueError, match="loss_type 'hinge' does not define simpo_gamma"):
        DPOLoss(loss_type="hinge", simpo_gamma=0.1)


def test_takes_what_the_function_takes() -> None:
    """Every argument, of the same type, either once or at each call."""

    def types(keywords: Any) -> dict[str, str]:
        return {name: kind.__forward_arg__ for name, kind in keywords.__annotations__.items()}

    parameters = dict(list(inspect.signature(dpo_loss).parameters.items())[3:])  # behind hidden, weight and targets
    parameters.pop("options")
    once, at_each_call = types(DPOLossKeywords), types(DPOLossInputs)
    assert not once.keys() & at_each_call.keys()
    expected = {name: parameter.annotation for name, parameter in parameters.items()} | types(LossKeywords)
    assert once | at_each_call == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [({"ref_logps": None}, "unexpected keyword argument 'ref_logps'"), ({"gamma": 1}, "argument 'gamma'")],
)
def test_has_no_other_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        DPOLoss(**options)


def test_options_are_given_once() -> None:
    batch = make_batch(9, 1, 3, 4, 7, torch.float32)
    with pytest.raises(TypeError, match="multiple values for keyword argument 'beta'"):
        DPOLoss()(batch.hidden, batch.weight, batch.targets, beta=0.2)
