"""Every causal language model class of transformers in a tiny configuration.

A configuration is what its class says by default with sizes made small: widths, counts of heads and experts, the
vocabulary; and with one layer of every kind that the default has. Lengths (windows, chunks, floors) are the caller's,
so that rows can be longer than any.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

# Of these, what cannot be made here, and why.
NOT_MADE = {
    "gemma3n": "needs the package timm",
    "gemma4_assistant": "its default configuration contradicts itself",
    "musicgen": "AutoModelForCausalLM does not take its configuration",
    "musicgen_melody": "AutoModelForCausalLM does not take its configuration",
}

VOCABULARY = 96
POSITIONS = 1024

# What a configuration's numbers are made, by their names.
_SIZES = {
    VOCABULARY: """
        vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size shape_vocab_size
        pronunciation_vocab_size audio_vocab_size encoder_hash_byte_group_vocab ngram_vocab_size_base
    """,
    POSITIONS: """
        max_position_embeddings n_positions n_ctx max_seq_len max_target_positions context_length
    """,
    64: """
        max_source_positions index_n_heads
    """,
    32: """
        hidden_size d_model n_embd dim_model emb_dim embedding_size word_embed_proj_dim embedding_dim input_size
        lru_width mamba_d_ssm input_embedding_size output_embedding_size pronunciation_embed_dim shape_embed_dim
        hidden_size_global router_hidden_size d_inner
    """,
    48: """
        intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner dff dim_ff ffn_hidden_size
        moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size intermediate_size_mlp
        dense_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size feed_forward_size
        shared_experts_intermediate_size moe_latent_size
    """,
    16: """
        q_lora_rank kv_lora_rank time_step_rank mamba_dt_rank qk_head_dim o_lora_rank attention_head_dim
    """,
    8: """
        head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim d_head dim_head attention_head_size kv_channels
        linear_key_head_dim linear_value_head_dim index_head_dim mamba_d_head mamba_head_dim mamba_headdim
        swa_head_dim linear_head_dim ssm_state_size state_size mamba_d_state hidden_size_per_layer_input ple_embed_dim
        hc_lowrank laurel_rank d_rel adapter_rank block_multiple_of loop_gate_rank global_head_dim swa_v_head_dim
        gated_norm_rank rotary_dim prompt_length segment_types prompt_types position_bias_num_buckets
        query_pre_attn_scalar
    """,
    4: """
        num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads
        num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads mamba_n_heads mamba_num_heads
        n_mamba_heads num_experts n_routed_experts num_local_experts linear_num_value_heads
        linear_num_heads moe_num_experts zero_expert_num altup_num_inputs mm_tokens_per_image num_query_groups
        num_buckets
    """,
    2: """
        num_key_value_heads num_kv_heads num_experts_per_tok moe_topk moe_k linear_num_key_heads
        swa_num_key_value_heads n_layer n_layers num_layers num_hidden_layers decoder_layers encoder_layers
        num_encoder_layers num_decoder_layers num_mem_blocks moe_num_experts_per_tok num_global_key_value_heads
    """,
    1: """
        mamba_n_groups n_groups mamba_ngroups n_group topk_group num_blocks n_shared_experts
    """,
}


def by_name(sizes: dict[int, str]) -> dict[str, int]:
    """name -> size, of size -> names."""
    return {name: value for value, names in sizes.items() for name in names.split()}


SIZES = by_name(_SIZES)

# Numbers that count tokens, and so may make a layer change with a position in the row.
_LENGTHS = """
    sliding_window attention_chunk_size window_size local_attention attention_window_size sliding_window_size
    keep_window_size floor_scale log_scaling_n_floor local_attn_chunk_length lsh_attn_chunk_length block_size
    chunk_size mamba_chunk_size index_block_size index_topk local_attention_window_len rel_extent mem_len
    original_max_position_embeddings relative_max_distance position_bias_max_distance
"""
LENGTHS = frozenset(_LENGTHS.split())

REMOVED = object()  # not given, so that the class computes it

# What the rules above do not make right.
_SPARSE = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}
OWN: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "bamba": {"mamba_d_head": 16, "attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
            for kind in ("sliding_attention", "full_attention")
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots3_note": {
        "text_config": {"per_layer_config": {}, "head_dim": 16},
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 16},
    "dory": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": [48] * 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
    },
    "granitemoehybrid": {"mamba_d_head": 16, "layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"num_hidden_layers": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "kimi_linear": {"num_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"head_dim": 16},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _SPARSE},
    "qwen4_exp_text": _SPARSE,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_shape": [32, 32], "axial_pos_embds_dim": [8, 24]},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "qk_head_dim": REMOVED, "v_head_dim": REMOVED},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "use_mamba_kernels": False,
    },
    "zamba2": {"mamba_expand": 2, "n_mamba_heads": 4, "mamba_headdim": REMOVED},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str, *, length: int = 64, **overrides: Any) -> PreTrainedConfig:
    """The configuration; ``length`` is what every window, chunk and floor is."""
    make = CONFIG_MAPPING[model_type]
    options = shrunk(make().to_dict(), length)
    return make(**merged(merged(options, OWN.get(model_type, {})), overrides))


def merged(options: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """The options with the others in their place, inside of dictionaries too; without what is :data:`REMOVED`."""
    both = {**options, **others}
    for name in options.keys() & others.keys():
        if isinstance(options[name], dict) and isinstance(others[name], dict):
            both[name] = merged(options[name], others[name])
    return {name: value for name, value in both.items() if value is not REMOVED}


def shrunk(default: dict[str, Any], length: int, sizes: dict[str, Any] = SIZES) -> dict[str, Any]:
    """What of a configuration is to be another than by default; ``sizes`` is what numbers of some names are made."""
    options: dict[str, Any] = _layers(default)
    for name, value in default.items():
        if isinstance(value, dict):
            if "model_type" in value:
                options[name] = {"model_type": value["model_type"], **shrunk(value, length, sizes)}
        elif isinstance(value, bool):
            if name == "use_sliding_window":
                options[name] = True
        elif name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            options[name] = ("pad_token_id", "bos_token_id", "eos_token_id").index(name)
        elif name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= VOCABULARY:
            options[name] = VOCABULARY - 1
        elif name in sizes and isinstance(value, type(sizes[name])):
            options.setdefault(name, sizes[name])
            if name == "num_key_value_heads" and "kv_lora_rank" in default:
                options[name] = sizes["num_attention_heads"]  # latent attention has as many
        elif name in LENGTHS and isinstance(value, int):
            options[name] = length
    return options


def _layers(default: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind, and at least two: the lists that have an entry a layer, cut to these."""
    count_name = next((name for name in ("num_hidden_layers", "num_layers", "n_layers") if name in default), None)
    count = default.get(count_name) if count_name else None
    lists = {
        name: value
        for name, value in default.items()
        if isinstance(value, list) and count and len(value) == count and value != list(range(count))
    }
    if not lists:
        return {}
    kinds = list(zip(*(map(str, value) for value in lists.values()), strict=True))
    layers = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())
    layers = layers if len(layers) > 1 else [0, 1]
    return {count_name: len(layers), **{name: [value[i] for i in layers] for name, value in lists.items()}}


def make_family(
    model_type: str,
    *,
    length: int = 64,
    scale: float = 1.0,
    trained: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> PreTrainedModel:
    """A random model in evaluation mode.

    Args:
        model_type: one of :data:`FAMILIES`.
        length: what every window, chunk and floor of the configuration is.
        scale: a factor of the initial matrices, so that attention is peaked.
        trained: matrices as large as in trained models, in the place of the initial ones, with uneven norms and biases.
        seed, dtype: of the weights.
        overrides: of the configuration.
    """
    config = tiny_config(model_type, length=length, **overrides)
    torch.manual_seed(seed)
    if dtype == torch.float64:
        config._experts_implementation = "eager"  # grouped products have no float64
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                if trained:
                    parameter.normal_(std=2 / math.sqrt(parameter.shape[-1]))
                parameter.mul_(scale)
            elif trained and parameter.dim() == 1 and name.endswith(("bias", "norm.weight", "attn.A")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model
