"""The models of a run: the one that is trained, with its adapter, and the one that stays beside it as a reference."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from fastdpo.model.adapters import (
    HUB_OPTIONS,
    adapters_are_neutral,
    copy_of_what_is_trained,
    has_transformers_adapter,
    is_adapter,
    load_adapter,
    trained_outside_adapters,
)
from fastdpo.model.auto_class import auto_class_of
from fastdpo.model.cut_weights import check_read_in_parts, naming_cut_model, sum_gradients_once
from fastdpo.model.language_model import described, language_model
from fastdpo.model.liger_kernels import put_liger_kernels_in
from fastdpo.model.load_sharding import check_adapter_of_plan, is_load_sharded, with_new_adapter
from fastdpo.model.quantization import make_trainable
from fastdpo.model.randomness import disable_dropout
from fastdpo.model.rotary import fix_frequencies
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.expert_parallel import check_expert_parallel
from fastdpo.trainer.manifest import name_some
from fastdpo.trainer.parallelism import loading_kwargs, refuse_copy
from fastdpo.trainer.zero import copied

logger = logging.getLogger(__name__)


def make_models(
    model: str | PreTrainedModel | PeftModel,
    ref_model: PreTrainedModel | PeftModel | None,
    args: DPOConfig,
    peft_config: PeftConfig | None,
    *,
    needs_reference: bool,
    is_sharded: bool,
    images: bool = False,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedModel | PeftModel | None]:
    """The policy, and the reference's own model; None where it has none, as with a new adapter, or is not needed.

    Args:
        model, ref_model, args, peft_config: the trainer's.
        needs_reference: during training; one that is asked beforehand is the policy as it is then.
        is_sharded: over processes, by FSDP or ZeRO-3, so that the weights cannot be looked at yet.
        images: the data has some.

    Raises:
        ValueError: there is nothing that can be trained, or it is a part of ``ref_model``.
        NotImplementedError: the model or its reference is not supported; the message names it.
    """
    name = model if isinstance(model, str) else None
    policy = load_model(model, args, images=images) if isinstance(model, str) else model
    if peft_config is not None:
        policy = with_new_adapter(policy, peft_config)
    if is_load_sharded(policy):
        if isinstance(policy, PeftModel):
            check_adapter_of_plan(policy)
        sum_gradients_once(policy)
    check_trainable(policy, args, is_sharded=is_sharded)
    if args.sync_ref_model and is_sharded and isinstance(policy, PeftModel):
        raise NotImplementedError(
            "sync_ref_model with an adapter is not supported with FSDP or DeepSpeed ZeRO-3, nor with a ref_model of "
            "your own. Train all weights, or on processes that each hold all of the model (DDP)"
        )
    if ref_model is not None:
        _refuse_shared(policy, ref_model)
    if ref_model is None and needs_reference:
        outside = trained_outside_adapters(policy) if isinstance(policy, PeftModel) else []
        if not isinstance(policy, PeftModel):
            ref_model = load_model(name, args, images=images) if name else _copy(policy)
        elif is_sharded:
            if outside:
                raise NotImplementedError(
                    f"{name_some(outside)} would be trained outside the adapter, so that the model without its adapter "
                    "would not stay the reference, and a copy is not supported with FSDP or DeepSpeed ZeRO-3. Leave "
                    "them as they are (bias='none'), or, with FSDP2, give precompute_ref_log_probs"
                )
            # Whether an adapter that was given is new cannot be seen yet: the check at the first step finds out.
            if name and peft_config is None:
                raise NotImplementedError(
                    f"{name} is an adapter, whose reference would be a copy of it, which is not supported with "
                    "FSDP or DeepSpeed ZeRO-3 yet. Merge it into its base (fastdpo merge), and give peft_config"
                )
        elif args.sync_ref_model or outside or not adapters_are_neutral(policy):
            refuse_copy(policy)
            # What is trained outside the adapter would take the model without it along.
            ref_model = copy_of_what_is_trained(policy)
    check_expert_parallel({"model": policy, "ref_model": ref_model})
    for each in (policy, ref_model):
        if each is not None and is_load_sharded(each):
            check_read_in_parts(each)
    if args.use_liger_kernel:
        for each in (policy, ref_model):
            if each is not None:
                put_liger_kernels_in(each, args.liger_kernel_config, args.device)
    if args.disable_dropout:
        disable_dropout(policy)
        if ref_model is not None:
            disable_dropout(ref_model)
    return policy, ref_model


def _copy(policy: PreTrainedModel | PeftModel) -> PreTrainedModel | PeftModel:
    refuse_copy(policy)
    return copied(policy)


def _refuse_shared(policy: PreTrainedModel | PeftModel, ref_model: PreTrainedModel | PeftModel) -> None:
    """Raises ValueError where a reference that was given would be trained with the policy."""
    trained = {id(parameter) for parameter in policy.parameters() if parameter.requires_grad}
    if shared := [name for name, parameter in ref_model.named_parameters() if id(parameter) in trained]:
        raise ValueError(
            f"ref_model holds weights of model that are trained ({name_some(shared)}), and would move with it: "
            "get_peft_model puts its layers into the very model that it is given. Leave ref_model out (of a new "
            "adapter it is the model without it), or load it once more"
        )


def load_model(name: str, args: DPOConfig, *, images: bool = False) -> PreTrainedModel | PeftModel:
    """The model or adapter of this name or path, with ``args.model_init_kwargs``; an adapter to be trained further.

    With ``images``, one that takes them.
    """
    # float32 weights: steps of 1e-6 are lost in bfloat16 ones.
    kwargs = {"dtype": torch.float32, "trust_remote_code": args.trust_remote_code, **args.init_kwargs}
    kwargs |= loading_kwargs(args)
    if kwargs.get("quantization_config") is not None and args.device.type == "cpu":
        kwargs.setdefault("device_map", {"": "cpu"})  # by itself, it goes to the accelerator that use_cpu rules out
    if is_adapter(name, **hub_options_of(args)):
        return load_adapter(name, images=images, **kwargs)
    load = auto_class_of(name, images=images, **kwargs).from_pretrained
    with naming_cut_model(name, kwargs):
        model: PreTrainedModel = load(name, **kwargs)
    return model


def hub_options_of(args: DPOConfig) -> dict[str, Any]:
    """How the Hub is asked for a model that is loaded by name, and for its tokenizer: revision, token, and the like."""
    return {name: value for name, value in args.init_kwargs.items() if name in HUB_OPTIONS}


def check_trainable(model: PreTrainedModel | PeftModel, args: DPOConfig, *, is_sharded: bool) -> None:
    """Raises where the model, as it was given or loaded, has nothing that can be trained.

    Raises:
        ValueError: nothing in it requires a gradient; its weights are quantised and it has no adapter; or what is
            trained is float16.
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
    halves = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if halves and getattr(args, "deepspeed_plugin", None) is None:  # which trains float32 copies of them
        raise ValueError(
            f"{name_some(halves)} would be trained in float16, which rounds small steps away and squares of gradients "
            "to 0, so that steps of any size come of them. Load the weights in float32 (--dtype float32), with bf16 or "
            "fp16 for layers that compute in 16 bits, or train an adapter (--use_peft), whose weights are float32"
        )


def fix_frequencies_of(models: Iterable[PreTrainedModel | PeftModel | None], args: DPOConfig) -> None:
    """Hold rotary frequencies still for the run, and say so once.

    Raises:
        NotImplementedError: see :func:`fastdpo.model.rotary.fix_frequencies`.
    """
    done = [fix_frequencies(language_model(model), args.max_length) for model in models if model is not None]
    if done[0] is not None and args.process_index == 0:
        logger.warning(done[0])


def settle_checkpointing(model: PreTrainedModel | PeftModel, args: DPOConfig) -> None:
    """Turns gradient checkpointing off, and says so, where it is on by default and the model has none.

    Raises:
        ValueError: it was asked for.
    """
    lm = language_model(model)
    if not args.activation_checkpointing or lm.supports_gradient_checkpointing:
        return
    name = described(lm)
    if args.asks_checkpointing:
        raise ValueError(f"gradient_checkpointing is on, but {name} has none; leave it out, or turn it off")
    args.activation_checkpointing = args.gradient_checkpointing = False
    if args.process_index == 0:
        logger.warning("Gradient checkpointing is off: %s has none.", name)


def compute_dtype(accelerator: Accelerator, model: PreTrainedModel | PeftModel) -> torch.dtype:
    """What the layers of ``model`` compute in."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, model.dtype)
