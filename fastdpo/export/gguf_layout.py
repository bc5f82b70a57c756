"""Where GGUF keeps the weights and settings of a model, family by family, as llama.cpp reads them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastdpo.export.live import MergeError

# model_type -> llama.cpp's architecture. Gemma of the first generation is read back by nothing here.
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
}
_SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")


@dataclass(frozen=True)
class Layout:
    """Of one model.

    Attributes:
        architecture: llama.cpp's name.
        values: settings by their keys after the architecture; floats, or whole numbers.
    """

    architecture: str
    values: dict[str, int | float]


def layout_of(model: PreTrainedModel) -> Layout:
    """The settings that llama.cpp needs.

    Raises:
        MergeError: the model has something that llama.cpp does not compute; the message names it.
    """
    config = model.config
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise MergeError(f"--gguf has no mapping for models of the type {config.model_type!r}, only for {known}")
    for why in _unlike_llama_cpp(config, architecture):
        raise MergeError(f"--gguf: the model {why}, and llama.cpp's {architecture} computes otherwise")
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    context, window = config.max_position_embeddings, getattr(config, "sliding_window", None)
    if config.model_type == "mistral" and window is not None:
        context = min(context, window)  # within which all is seen, as llama.cpp has it
    values: dict[str, int | float] = {
        "block_count": config.num_hidden_layers,
        "context_length": context,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(rope["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    if architecture.startswith("gemma"):
        values["attention.sliding_window"] = int(window or 0)
        values |= {name: float(getattr(config, name)) for name in _SOFTCAPS if getattr(config, name) is not None}
    if rope.get("rope_type", "default") == "linear":
        values["rope.scaling.factor"] = float(rope["factor"])
    return Layout(architecture, values)


def _unlike_llama_cpp(config: Any, architecture: str) -> Iterator[str]:
    """What of a configuration llama.cpp does otherwise, in words."""
    rope = config.rope_parameters
    kind = rope.get("full_attention", rope).get("rope_type", "default")
    if kind not in ("default", "linear", *(["llama3"] if architecture == "llama" else [])):
        yield f"has rotary frequencies of the kind {kind}"
    if (rope.get("full_attention", rope).get("partial_rotary_factor") or 1) != 1:
        yield "turns a part of each head alone"
    is_gemma = architecture.startswith("gemma")
    expected = ("gelu_pytorch_tanh",) if is_gemma else ("silu",)
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if activation not in expected:
        yield f"has the activation {activation}"
    if architecture != "llama" and getattr(config, "attention_bias", False):
        yield "has biases in its attention"
    types = getattr(config, "layer_types", None) or []
    if not is_gemma:
        if config.model_type != "mistral" and "sliding_attention" in types:
            yield "has a sliding window"
        return
    head_dim, width = config.head_dim, config.hidden_size // config.num_attention_heads
    if config.query_pre_attn_scalar != (width if config.num_hidden_layers in (46, 62) else head_dim):
        yield f"scales queries by {config.query_pre_attn_scalar}"
    every = 2 if architecture == "gemma2" else 6
    pattern = [
        "full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(config.num_hidden_layers)
    ]
    if list(types) != pattern:
        yield f"has full attention in other layers than each {every}th"
    if architecture == "gemma3":
        local = rope["sliding_attention"]
        if local["rope_theta"] != 10_000:
            yield f"has a rotary base of {local['rope_theta']} in layers with a window"
        if local.get("rope_type", "default") != "default":
            yield f"has rotary frequencies of the kind {local['rope_type']} in layers with a window"
    for name in _SOFTCAPS:  # Gemma 2 always has both there, and Gemma 3 never
        value = getattr(config, name)
        if (value is None) == (architecture == "gemma2"):
            yield f"has no {name}" if value is None else f"has {name} {value}"
    if getattr(config, "use_bidirectional_attention", None):
        yield "sees tokens that come later"


def tensors_of(model: PreTrainedModel, layout: Layout) -> Iterator[tuple[str, Tensor]]:
    """GGUF's name and value of each weight, in float32.

    Raises:
        MergeError: a weight has no name there.
    """
    import gguf

    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == layout.architecture)
    names = gguf.get_tensor_name_map(kind, model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():  # tied weights once
        ours, dot, suffix = name.rpartition(".")
        theirs = names.get_name(ours)
        if theirs is None:
            raise MergeError(f"--gguf: llama.cpp's {layout.architecture} has no place for {name}")
        value = parameter.detach().float()
        if layout.architecture.startswith("gemma") and theirs.endswith("norm"):
            value = value + 1  # llama.cpp multiplies by what is stored
        if layout.architecture == "llama" and theirs.endswith(("attn_q", "attn_k")):
            config = model.config
            heads = config.num_attention_heads if theirs.endswith("attn_q") else config.num_key_value_heads
            value = _interleaved(value, heads)
        yield f"{theirs}{dot}{suffix}", value
    factors = _frequency_factors(model)
    if factors is not None:
        yield "rope_freqs.weight", factors


def _interleaved(value: Tensor, heads: int) -> Tensor:
    """A head's rows [first half, second half] in pairs, one of each: llama.cpp turns neighbours."""
    return value.view(heads, 2, value.shape[0] // heads // 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape)


def _frequency_factors(model: PreTrainedModel) -> Tensor | None:
    """By what the plain rotary frequencies are divided, where the model has others (Llama 3.1 and later)."""
    rope = model.config.rope_parameters
    if rope.get("rope_type", "default") != "llama3":
        return None
    used: Tensor = model.model.rotary_emb.inv_freq.detach().double().cpu()
    powers = -torch.arange(used.numel(), dtype=torch.float64) / used.numel()
    return torch.pow(float(rope["rope_theta"]), powers).div(used).float()
