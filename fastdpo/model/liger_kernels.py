"""Liger's Triton kernels (arXiv 2410.10989) in a model's layers: norms, rotary embeddings, MLPs. Never in its head.

Liger would also replace the forward of the whole model, by one that computes the loss and keeps the logits to itself:
the head and the loss are ours, and with it :class:`fastdpo.model.FusedHead` would have nothing to stand in.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_liger_kernel_available

from fastdpo.model.language_model import described

# Liger's names for what stands in the place of the head and of its loss.
HEAD = ("fused_linear_cross_entropy", "cross_entropy")


def body_only(config: Mapping[str, Any] | None) -> dict[str, Any]:
    """``liger_kernel_config`` with what is Liger's of the head turned off.

    Raises:
        ValueError: it turns that on.
    """
    asked = [name for name in HEAD if (config or {}).get(name)]
    if asked:
        raise ValueError(
            f"liger_kernel_config turns {asked[0]} on, but the head and the loss are fastdpo's; leave it out: the "
            "other kernels are Liger's all the same"
        )
    return {**(config or {}), **dict.fromkeys(HEAD, False)}


def put_liger_kernels_in(
    model: PreTrainedModel | PeftModel, config: Mapping[str, Any] | None, device: torch.device
) -> None:
    """Have the layers of ``model`` compute by Liger's kernels.

    Liger also changes the module of transformers that the model's class is in: models of that type that are loaded
    later in the process have its kernels too.

    Args:
        model: not yet wrapped for several devices.
        config: kernel -> whether it is used; by default those that Liger has on.
        device: where the model will run.

    Raises:
        ImportError: liger-kernel is not installed.
        NotImplementedError: Liger has none for such a model; or the device is a CPU, on which Triton's do not run.
        ValueError: ``config`` names a kernel that Liger does not have for such a model, or one of the head's.
    """
    config = body_only(config)
    if not is_liger_kernel_available():
        raise ImportError("use_liger_kernel is on, but liger-kernel is not installed (pip install liger-kernel)")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise NotImplementedError(
            "use_liger_kernel is on, but Liger's kernels are Triton's, which do not run on a CPU; leave it out there: "
            "the head and the loss are fused without it"
        )
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    inner = cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)
    kernels = MODEL_TYPE_TO_APPLY_LIGER_FN.get(inner.config.model_type)
    if kernels is None:
        raise NotImplementedError(
            f"use_liger_kernel is on, but Liger has no kernels for {described(inner)}; leave it out"
        )
    known = [name for name in inspect.signature(kernels).parameters if name != "model"]
    if unknown := [name for name in config if name not in (*known, *HEAD)]:
        has = ", ".join(name for name in known if name not in HEAD)
        raise ValueError(
            f"liger_kernel_config names {unknown[0]}, which Liger does not have for {described(inner)}; it has {has}"
        )
    apply_liger_kernel(model, config)
