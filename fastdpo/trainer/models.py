"""The models of a run: the one that is trained, with its adapter, and the one that stays beside it as a reference."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from fastdpo.model.adapters import (
    adapters_are_neutral,
    copy_of_what_is_trained,
    has_transformers_adapter,
    is_adapter,
    load_adapter,
)
from fastdpo.model.quantization import make_trainable
from fastdpo.trainer.config import DPOConfig


def make_models(
    model: str | PreTrainedModel | PeftModel,
    ref_model: PreTrainedModel | PeftModel | None,
    args: DPOConfig,
    peft_config: PeftConfig | None,
    *,
    needs_reference: bool,
    is_sharded: bool,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedModel | PeftModel | None]:
    """The policy, and the reference's own model; None where it has none, as with a new adapter, or is not needed.

    Args:
        model, ref_model, args, peft_config: the trainer's.
        needs_reference: during training; one that is asked beforehand is the policy as it is then.
        is_sharded: over processes, by FSDP or ZeRO-3, so that the weights cannot be looked at yet.

    Raises:
        ValueError: there is nothing that can be trained.
        NotImplementedError: the model or its reference is not supported; the message names it.
    """
    name = model if isinstance(model, str) else None
    policy = load_model(model, args) if isinstance(model, str) else model
    if peft_config is not None:
        policy = get_peft_model(policy, peft_config)
    check_trainable(policy, args, is_sharded=is_sharded)
    if ref_model is None and needs_reference:
        if not isinstance(policy, PeftModel):
            ref_model = load_model(name, args) if name else copy.deepcopy(policy)
        elif is_sharded:
            # Whether an adapter that was given is new cannot be seen yet: the check at the first step finds out.
            if name and peft_config is None:
                raise NotImplementedError(
                    f"{name} is an adapter, whose reference would be a copy of it, which is not supported with "
                    "FSDP or DeepSpeed ZeRO-3 yet. Merge it into its base (merge_and_unload), and give peft_config"
                )
        elif not adapters_are_neutral(policy):
            ref_model = copy_of_what_is_trained(policy)
    if args.disable_dropout:
        disable_dropout(policy)
        if ref_model is not None:
            disable_dropout(ref_model)
    return policy, ref_model


def load_model(name: str, args: DPOConfig) -> PreTrainedModel | PeftModel:
    """The model or adapter of this name or path, with ``args.model_init_kwargs``; an adapter to be trained further."""
    # float32 weights: steps of 1e-6 are lost in bfloat16 ones.
    kwargs = {"dtype": torch.float32, "trust_remote_code": args.trust_remote_code, **args.init_kwargs}
    if kwargs.get("quantization_config") is not None and args.device.type == "cpu":
        kwargs.setdefault("device_map", {"": "cpu"})  # by itself, it goes to the accelerator that use_cpu rules out
    if is_adapter(name, revision=kwargs.get("revision")):
        return load_adapter(name, **kwargs)
    return AutoModelForCausalLM.from_pretrained(name, **kwargs)


def revision_of(args: DPOConfig) -> str | None:
    """Branch, tag or commit of a model that is loaded by name; None for the default."""
    revision: str | None = args.init_kwargs.get("revision")
    return revision


def check_trainable(model: PreTrainedModel | PeftModel, args: DPOConfig, *, is_sharded: bool) -> None:
    """Raises where the model, as it was given or loaded, has nothing that can be trained.

    Raises:
        ValueError: nothing in it requires a gradient, or its weights are quantised and it has no adapter.
        NotImplementedError: see :func:`fastdpo.model.quantization.make_trainable`.
    """
    has_adapter = isinstance(model, PeftModel) or has_transformers_adapter(model)
    make_trainable(model, has_adapter=has_adapter, device=args.device, is_sharded=is_sharded)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        how = "see requires_grad_"
        if isinstance(model, PeftModel):
            how = "load the adapter with is_trainable=True"
        elif has_transformers_adapter(model):
            how = "load it by AutoPeftModelForCausalLM.from_pretrained(adapter, is_trainable=True), or give its name"
        raise ValueError(f"no parameter of model requires a gradient, so there is nothing to train; {how}")


def aux_loss_coef(model: PreTrainedModel | PeftModel, args: DPOConfig) -> float:
    """The weight of a mixture of experts' load-balancing loss; 0 for other models.

    Raises:
        ValueError: one is given, and the model has no such loss.
    """
    config = model.config.get_text_config()
    if not hasattr(config, "output_router_logits"):
        if args.router_aux_loss_coef:
            raise ValueError(
                f"router_aux_loss_coef is {args.router_aux_loss_coef}, but a {config.model_type} has no load-balancing "
                "loss; leave it out"
            )
        return 0.0
    if args.router_aux_loss_coef is not None:
        return args.router_aux_loss_coef
    return getattr(config, "router_aux_loss_coef", 0.0)


def compute_dtype(accelerator: Accelerator, model: PreTrainedModel | PeftModel) -> torch.dtype:
    """What the layers of ``model`` compute in."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, model.dtype)


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout in ``model`` to 0: the modules', and what layers keep as numbers."""
    for module, name in _dropouts(model):
        setattr(module, name, 0.0)


def has_dropout(model: nn.Module) -> bool:
    """Whether there is a dropout in ``model`` that is not 0."""
    return any(getattr(module, name) > 0 for module, name in _dropouts(model))


def _dropouts(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Where ``model`` keeps the probabilities of its dropouts: (module, attribute)."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            yield module, "p"
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or "pdrop" in name or "layerdrop" in name):
                yield module, name
