"""LoRA adapters of PEFT on the output embedding itself, as low-rank updates of its weight."""

from __future__ import annotations

from typing import cast

from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fastdpo.logps.low_rank import LowRankUpdate


def why_not_supported(layer: nn.Module) -> str | None:
    """What of a layer of PEFT's does not amount to low-rank updates of an ``nn.Linear``; None if all of it does."""
    # fully_shard gives a module a class of its own, made of FSDPModule and the class that it had.
    kind = type(layer).__mro__[2] if isinstance(layer, FSDPModule) else type(layer)
    if kind is not LoraLinear:
        return "of which only plain LoRA (peft.tuners.lora.layer.Linear) is supported"
    layer = cast(LoraLinear, layer)
    base = layer.base_layer
    if type(base).forward is not nn.Linear.forward:
        return f"on a {type(base).__module__}.{type(base).__name__}, where only nn.Linear is supported"
    if "forward" in vars(base):
        return f"on an nn.Linear whose forward was replaced, by {base.forward!r}"
    if layer.lora_variant:
        kinds = sorted({type(variant).__name__ for variant in layer.lora_variant.values()})
        return f"of a kind ({', '.join(kinds)}) that is not plain LoRA"
    if any(layer.lora_bias.values()):
        return "with a bias of its own (lora_bias)"
    if layer.fan_in_fan_out:
        return "with fan_in_fan_out, which nn.Linear is not"
    for part in (*layer.lora_A.values(), *layer.lora_B.values()):
        if type(part).forward is not nn.Linear.forward or "forward" in vars(part):
            return f"whose matrices are in a {type(part).__module__}.{type(part).__name__}, not in an nn.Linear"
    return None


def active_updates(layer: LoraLinear, hidden: Tensor) -> tuple[LowRankUpdate, ...]:
    """What the layer adds to its base layer's weight now, as its own forward decides it; ``hidden`` is its input."""
    if layer.disable_adapters:
        if layer.merged:
            layer.unmerge()
        return ()
    if layer.merged:
        return ()
    return tuple(_update(layer, name, hidden) for name in layer.active_adapters if name in layer.lora_A)


def _update(layer: LoraLinear, name: str, hidden: Tensor) -> LowRankUpdate:
    a, b = (cast(nn.Linear, side[name]).weight for side in (layer.lora_A, layer.lora_B))
    dropout = layer.lora_dropout[name]
    drops = isinstance(dropout, nn.Dropout) and dropout.training
    return LowRankUpdate(a, b, layer.scaling[name], dropout(hidden) if drops else None)
