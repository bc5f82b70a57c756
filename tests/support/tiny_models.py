"""Causal language models of every supported kind, small enough to be made on the spot."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2_SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256, "head_dim": None, "hidden_size": None}

# model_type -> what it needs beside the sizes. Scales and softcaps are strong enough to be missed if they were.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {},
    "phi": {},  # a bias in the output embedding
    "phi3": {},
    "olmo2": {},
    "smollm3": {},
    "gpt2": _GPT2_SIZES,  # tied embeddings
    "gpt_neox": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gemma2": {"final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "nanochat": {"final_logit_softcapping": 2.0},
    "recurrent_gemma": {"lru_width": 32, "logits_soft_cap": 2.0, "attention_window_size": 256, "num_hidden_layers": 3},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
    "granitemoe": {"logits_scaling": 3.0, "num_local_experts": 4, "num_experts_per_tok": 2},
    "hyperclovax": {"logits_scaling": 0.4},
    "falcon_h1": {
        "lm_head_multiplier": 0.6,
        "head_dim": None,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "mamba": {"state_size": 8, "expand": 2, "conv_kernel": 4, "time_step_rank": 4},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},  # attention sinks
    "bert": {"is_decoder": True},  # the output embedding lies deep inside a prediction head
    "trocr": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48},
}


def make_model(
    model_type: str, vocab_size: int = 384, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any
) -> PreTrainedModel:
    """A random model in evaluation mode, whose logits are spread over some units."""
    options = {"vocab_size": vocab_size, **_SIZES, **FAMILIES[model_type], **overrides}
    config = AutoConfig.for_model(model_type, **{name: value for name, value in options.items() if value is not None})
    torch.manual_seed(seed)
    if dtype == torch.float64:
        config._experts_implementation = "eager"  # grouped products have no float64
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    embedding = model.get_output_embeddings()
    with torch.no_grad():
        embedding.weight.normal_(std=0.3)
        if embedding.bias is not None:
            embedding.bias.normal_()
    return model
