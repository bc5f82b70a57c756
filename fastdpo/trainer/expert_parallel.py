"""Mixtures of experts that transformers spreads over processes: what such a run cannot have is said before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from fastdpo.model.expert_check import is_of_experts, spread_experts
from fastdpo.model.language_model import described, language_model
from fastdpo.model.load_sharding import sizes_of

_SETTING = "distributed_config"  # of from_pretrained
_OLD_FLAG = "enable_expert_parallel"  # which transformers makes an ep_size and an empty tp_plan of
_FORWARD_ONLY = "deepgemm_megamoe"

_HOW = (
    "give fsdp_size: N and ep_size: N, for processes with pairs of their own; or tp_size: N and ep_size: N, for "
    "processes that share pairs, and have a part of every layer each"
)


def check_expert_setting(init_kwargs: Mapping[str, Any]) -> None:
    """Raises where a model that is loaded with these would not be spread over processes, or not be trained.

    Args:
        init_kwargs: what ``from_pretrained`` is given.

    Raises:
        ValueError: sizes contradict each other.
        NotImplementedError: this version of transformers cannot load it so, or not train it.
    """
    setting = init_kwargs.get(_SETTING)

    def asked(name: str) -> Any:
        return setting.get(name) if isinstance(setting, Mapping) else getattr(setting, name, None)

    old = bool(asked(_OLD_FLAG)) and asked("ep_size") is None
    ep_size, tp_size = asked("ep_size") or 1, asked("tp_size") or 1
    if ep_size == 1 and not old:
        return
    if old or (tp_size > 1 and asked("tp_plan") == {}):
        asks = f"{_OLD_FLAG}: true" if old else "tp_plan: {}"
        raise NotImplementedError(
            f"{_SETTING} has {asks}, which would spread the experts and leave all else whole: transformers finds no "
            f"plan to load that by. Instead, {_HOW}"
        )
    if ep_size % tp_size or (asked("fsdp_size") or 1) * tp_size % ep_size:
        raise ValueError(
            f"{_SETTING} has ep_size {ep_size}, which has to be a multiple of tp_size ({tp_size}) and to divide "
            f"fsdp_size times tp_size ({asked('fsdp_size') or 1} times {tp_size}): {_HOW}"
        )
    if _FORWARD_ONLY in (asked("ep_implementation"), init_kwargs.get("experts_implementation")):
        raise NotImplementedError(f"{_FORWARD_ONLY} has no backward, and cannot be trained with; leave it out")


def check_expert_parallel(models: Mapping[str, PreTrainedModel | PeftModel | None]) -> None:
    """Raises for what is not supported of models that are loaded expert-parallel.

    Args:
        models: by what they are called; None for none.

    Raises:
        ValueError: one was to be, and has no experts that are spread.
        NotImplementedError: the message says what to use.
    """
    for called, model in models.items():
        size = 1 if model is None else sizes_of(model).get("ep", 1)
        if model is None or size == 1:
            continue
        lm = language_model(model)
        name = f"{called}, {described(lm)},"
        experts = dict(spread_experts(lm))
        if not experts:
            raise ValueError(
                f"{name} was loaded with ep_size={size}, but has no experts that its plan spreads over processes; "
                f"leave ep_size out of {_SETTING}"
            )
        if getattr(lm, "is_quantized", False):
            raise NotImplementedError(f"{name} is quantised, and its experts are spread over processes; use one of it")
        if _FORWARD_ONLY in (lm.config.distributed_config.ep_implementation, lm.config._experts_implementation):
            raise NotImplementedError(f"{name} has {_FORWARD_ONLY}, which has no backward; load it without")
        for path, module in experts.items():
            for parameter_name, parameter in module.named_parameters():
                if parameter.requires_grad and not is_of_experts(parameter):
                    raise NotImplementedError(
                        f"{name} has experts that are spread over processes ({path}), and {parameter_name} among them, "
                        "which is not: each process would train it on the tokens that its experts get. Leave ep_size "
                        f"out of {_SETTING}, or do not train it (requires_grad)"
                    )
