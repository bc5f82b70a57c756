"""Models that have shapes and no numbers, made from a configuration."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, TypeVar

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from fastdpo.model.auto_class import auto_class_of
from fastdpo.model.language_model import described, language_model
from fastdpo.model.randomness import disable_dropout
from fastdpo.plan.layers import stack_of
from fastdpo.plan.quantized import quantize
from fastdpo.plan.setup import Setup

Module = TypeVar("Module", bound=nn.Module)


# What was made last: to make a model costs more than to copy it, and ways to train differ in what is put around it.
_KEPT = 4
_made: list[tuple[PreTrainedConfig, tuple[Any, ...], PreTrainedModel]] = []
_looked_at: list[tuple[PreTrainedConfig, PeftConfig | None, tuple[Any, ...], PreTrainedModel | PeftModel]] = []


def make_base(setup: Setup, layers: int | None = None) -> PreTrainedModel:
    """The model without an adapter, of the class that a run would load it as, on the device ``meta``.

    With ``layers``, it has so many of them and no more.
    """
    model = _whole_base(setup)
    stack = stack_of(model)
    if layers is None or stack is None:
        return copy.deepcopy(model)
    left_out = list(stack[layers:])
    del stack[layers:]
    try:
        return copy.deepcopy(model)
    finally:
        stack.extend(left_out)


def _whole_base(setup: Setup) -> PreTrainedModel:
    """Not to be changed."""
    quantized = (setup.bits, setup.bits_compute, setup.nested) if setup.bits else None
    kind = (setup.dtype, setup.attn_implementation, setup.trust_remote_code, quantized)
    for config, of_kind, model in _made:
        if config is setup.config and of_kind == kind:
            return model
    model = _make_base(setup)
    _made.append((setup.config, kind, model))
    del _made[:-_KEPT]
    return model


def _make_base(setup: Setup) -> PreTrainedModel:
    config = copy.deepcopy(setup.config)
    auto_class = auto_class_of("", images=False, config=config)
    with torch.device("meta"):
        model: PreTrainedModel = auto_class.from_config(
            config,
            dtype=setup.dtype,
            attn_implementation=setup.attn_implementation,
            trust_remote_code=setup.trust_remote_code,
        )
        if setup.bits:
            quantize(model, setup.bits, setup.bits_compute, nested=setup.nested)
    return model


def make_policy(setup: Setup, layers: int | None = None) -> PreTrainedModel | PeftModel:
    """What is trained, in training mode, with checkpointing if the setup has it; ``layers``: see :func:`make_base`.

    Raises:
        NotImplementedError: checkpointing is on, and the model has none.
    """
    model: PreTrainedModel | PeftModel = make_base(setup, layers)
    if setup.peft_config is not None:
        with torch.device("meta"):
            model = get_peft_model(model, copy.deepcopy(setup.peft_config))
    disable_dropout(model)
    if setup.checkpointing:
        lm = language_model(model)
        if not lm.supports_gradient_checkpointing:
            raise NotImplementedError(f"{described(lm)} has no gradient checkpointing; leave it out")
        options = dict(setup.checkpointing_kwargs)
        lm.activation_checkpointing_enable(
            every_n_layers=options.pop("every_n_layers", 1),
            offload=options.pop("offload", False),
            activation_checkpointing_kwargs=options or None,
        )
    model.train()
    return model


def look_at_policy(setup: Setup) -> PreTrainedModel | PeftModel:
    """What is trained, without checkpointing; one for all setups with the same model and adapter, and not to be run."""
    kind = (setup.dtype, setup.bits, setup.nested, setup.attn_implementation, setup.trust_remote_code)
    for config, adapter, of_kind, policy in _looked_at:
        if config is setup.config and adapter is setup.peft_config and of_kind == kind:
            return policy
    policy = make_policy(replace(setup, checkpointing=False))
    _looked_at.append((setup.config, setup.peft_config, kind, policy))
    del _looked_at[:-_KEPT]
    return policy


def make_reference(setup: Setup, layers: int | None = None) -> PreTrainedModel:
    """The second model that stays beside the policy."""
    model = make_base(setup, layers)
    model.eval()
    model.requires_grad_(False)
    return model


def placed(model: Module) -> Module:
    """The same model, its tensors made anew on the CPU: inside a ``FakeTensorMode``, without numbers there either.

    On ``meta`` an operation knows no device, and takes another way than on one.
    """
    made: dict[int, Tensor] = {}

    def anew(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = torch.empty(tensor.shape, dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if is_parameter else empty
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = anew(tensor)  # type: ignore[assignment]  # a parameter for a parameter
    return model
