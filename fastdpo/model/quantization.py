"""Models in 4 or 8 bits by bitsandbytes (QLoRA, Dettmers et al. 2023, arXiv 2305.14314), made, checked or refused."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import nn
from transformers import BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available

INSTALL = "pip install bitsandbytes"


def make_quantization_config(
    bits: int,
    *,
    compute_dtype: torch.dtype | None = None,
    quant_type: str = "nf4",
    nested: bool = False,
    storage: torch.dtype | None = None,
) -> BitsAndBytesConfig:
    """What ``from_pretrained`` takes as ``quantization_config``; the output embedding stays as it is.

    Args:
        bits: 4 or 8.
        compute_dtype: 4 bits: what weights are dequantised to for their products. By default float32.
        quant_type: 4 bits: ``nf4`` or ``fp4``.
        nested: 4 bits: the scales are quantised as well.
        storage: 4 bits: the type of the tensors that hold them, two or more in each element. By default uint8.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    if not is_bitsandbytes_available():
        raise ImportError(f"weights in {bits} bits (--load_in_{bits}bit) need bitsandbytes: {INSTALL}")
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_quant_storage=storage,
    )


def quantization_of(config: Any) -> dict[str, Any]:
    """Of a ``quantization_config``, what has to be known to quantise a base again; empty for None and other kinds."""
    names = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
    return {name: getattr(config, name) for name in names if getattr(config, name, None)}


def refuse_quantized_alone() -> NoReturn:
    """ValueError: quantised weights would have to be trained themselves."""
    raise ValueError(
        "the model's weights are quantised, and cannot be trained; train an adapter on them: peft_config (--use_peft)"
    )


def make_trainable(model: Any, *, has_adapter: bool, device: torch.device, is_sharded: bool) -> None:
    """Checks that a model that is quantised can be trained, and keeps its layers in the form that has gradients.

    Args:
        model: with its adapter; nothing is done to one that is not quantised.
        has_adapter: whether it has one.
        device: where it is trained.
        is_sharded: over processes, by FSDP or ZeRO-3.

    Raises:
        ValueError: it has no adapter.
        NotImplementedError: its layers cannot be trained there.
    """
    if not getattr(model, "is_quantized", False):
        return
    if not (has_adapter or model.hf_quantizer.is_qat_trainable):
        refuse_quantized_alone()
    if is_sharded:
        raise NotImplementedError(
            "a quantised model is not supported with FSDP or DeepSpeed ZeRO-3; every process can hold all of it, "
            "which 4 bits are for: use DDP (torchrun, accelerate launch without either)"
        )
    if device.type == "cpu" and getattr(model, "is_loaded_in_8bit", False):
        raise NotImplementedError(
            "bitsandbytes' 8-bit layers compute one thing in training and another in evaluation on a CPU, so that "
            "policy and reference would not agree; use 4 bits (load_in_4bit) there, or a GPU"
        )
    keep_as_trained(model)


def keep_as_trained(model: nn.Module) -> None:
    """Have 4-bit layers compute in evaluation what they compute in training."""
    # On CPUs with AVX512-BF16, a 4-bit layer's first evaluation lays its weight out anew, for a product that has no
    # gradient, and leaves it so.
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # of a class that we do not import
