"""Models that ``from_pretrained`` spread over processes: transformers' ``DistributedConfig``, its ``tp_plan``.

Each process has read its parts of the weights alone, and the modules' own forwards exchange what they need.
"""

from __future__ import annotations

import sys
from typing import Any, cast

from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import Embedding as LoraEmbedding
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel

from fastdpo.model.language_model import described, language_model

# What has PEFT train a copy of a module, or of some of its rows.
_COPYING = ("modules_to_save", "trainable_token_indices")


def sizes_of(model: PreTrainedModel | PeftModel) -> dict[str, int]:
    """How many processes share what; empty where they share nothing.

    ``tp`` is for a layer's weights, ``dp`` (FSDP) for all weights, ``pp`` for layers, ``ep`` for experts.
    """
    lm = language_model(model)
    if not getattr(lm, "is_distributed_loading_by_transformers", False):
        return {}
    config: Any = lm.config.distributed_config
    return {"tp": config.tp_size, "dp": config.dp_size, "pp": config.pp_size, "ep": config.ep_size}


def is_load_sharded(model: PreTrainedModel | PeftModel) -> bool:
    """Whether ``from_pretrained`` spread the model over processes."""
    return bool(sizes_of(model))


def shares_all_weights(model: PreTrainedModel | PeftModel) -> bool:
    """Whether processes with different data share all weights, by FSDP where it was loaded, and meet in forwards."""
    return sizes_of(model).get("dp", 1) > 1


def with_new_adapter(model: PreTrainedModel | PeftModel, config: PeftConfig) -> PeftModel:
    """``model`` with a new adapter; of one that tensor parallelism has cut, with the very adapter of a whole one.

    PEFT gives the layers of an adapter the sizes of a rank's part, and has every rank draw its part by itself: in other
    numbers, of another spread, than are drawn where the model is whole. And transformers takes the size of a layer that
    is cut by rows for the whole one's. A whole adapter PEFT knows how to cut.
    """
    if not is_load_sharded(model):
        return cast(PeftModel, get_peft_model(cast(PreTrainedModel, model), config))
    if shares_all_weights(model):
        copying = [name for name in _COPYING if getattr(config, name, None)]
        if copying:
            raise NotImplementedError(
                f"{described(language_model(model))} has its weights sharded by FSDP as it is loaded (fsdp_size), and "
                f"{copying[0]} would train copies of some of them, which FSDP has none of. Leave {copying[0]} out, or "
                "start the run with FSDP2 in its place (accelerate launch --use_fsdp --fsdp_version 2)"
            )
    lora_layer: Any = sys.modules[LoraLinear.__module__]
    sizes_by_peft = lora_layer._get_in_out_features

    def whole_sizes(module: nn.Module) -> tuple[int | None, int | None]:
        return (module.in_features, module.out_features) if isinstance(module, nn.Linear) else sizes_by_peft(module)

    lora_layer._get_in_out_features = whole_sizes
    try:
        return cast(PeftModel, get_peft_model(cast(PreTrainedModel, model), config))
    finally:
        lora_layer._get_in_out_features = sizes_by_peft


def check_adapter_of_plan(model: PeftModel) -> None:
    """See that the adapter on a model that tensor parallelism has cut computes and trains what it does on a whole one.

    Raises:
        NotImplementedError: it is of a kind for which PEFT knows nothing of the cut; the message says what to use.
    """
    name = described(language_model(model))
    cut = "cut by tensor parallelism" if sizes_of(model)["tp"] > 1 else "cut over processes by its plan"

    def refused(what: str, advice: str) -> NotImplementedError:
        return NotImplementedError(f"{name} is {cut}, and {what}, which is not supported with it: {advice}")

    if sizes_of(model)["tp"] > 1 and sizes_of(model)["dp"] > 1:
        # Its parts would be trained by each group of ranks by themselves: nobody averages their gradients.
        raise refused(
            "its weights are sharded by FSDP as well, and it has an adapter", "use tp_size or fsdp_size alone"
        )
    for path, module in model.named_modules():
        if isinstance(module, (ModulesToSaveWrapper, TrainableTokensWrapper)) and _has_plan(module):
            # A copied module keeps the forward that the plan gave to the one that it was copied from.
            raise refused(
                f"the adapter trains a copy of {path}",
                "leave that out (modules_to_save, trainable_token_indices), or use FSDP2 instead",
            )
        if isinstance(module, BaseTunerLayer) and _has_plan(module.get_base_layer()):
            if type(module) not in (LoraLinear, LoraEmbedding):
                raise refused(f"the adapter's layers are a {type(module).__name__}", "use plain LoRA")
            assert isinstance(module, (LoraLinear, LoraEmbedding))
            if module.lora_variant:
                kinds = sorted({type(variant).__name__ for variant in module.lora_variant.values()})
                raise refused(f"the adapter is LoRA of a kind of its own ({', '.join(kinds)})", "use plain LoRA")
            if isinstance(module, LoraLinear):
                a_sizes = {layer.in_features for layer in module.lora_A.values()}
                if a_sizes != {module.get_base_layer().in_features}:
                    raise refused(
                        f"PEFT gave the adapter of {path} the size of a rank's part",
                        "give DPOTrainer peft_config, in the place of a model from get_peft_model",
                    )
            if any(module.lora_bias.values()):
                raise refused("the adapter has biases (lora_bias)", "use plain LoRA")


def _has_plan(module: nn.Module) -> bool:
    return any(getattr(part, "_is_hooked", False) for part in module.modules())
