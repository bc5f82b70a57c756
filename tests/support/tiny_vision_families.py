"""Every class of transformers' image-text-to-text mapping, tiny, as :mod:`tiny_families` makes the others."""

from __future__ import annotations

from typing import Any

import torch
from tiny_families import OWN, SIZES, VOCABULARY, by_name, merged, shrunk
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

VISION_FAMILIES = sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)

# Of these, what cannot be made here, and why.
NOT_MADE = {
    "evolla": "AutoModelForImageTextToText does not take its configuration",
    "fast_vlm": "needs the package timm",
    "gemma3n": "needs the package timm",
    "inkling_mm_model": "needs the package scipy",
    "perception_lm": "needs the package timm",
}

# Of towers, and of what lies between them and the text.
_SIZES = {
    64: """
        position_embedding_size max_image_size max_img_size min_image_size max_vit_seq_len img_max_token_num
        max_num_patches seq_len max_temporal_embeddings
    """,
    32: """
        out_hidden_size projection_dim vision_output_dim projector_input_dim projector_output_dim embed_dim
        projector_hidden_size text_hidden_size base_channels downsample_hidden_size output_dim projection_hidden_dim
        image_token_embed_dim patch_embed_hidden_size latent_channels decoder_hidden_size
        post_conv_in_channels post_conv_out_channels post_conv_mid_channels output_channels encoder_hidden_size
        codebook_dim moe_hidden_size vision_hidden_size num_filters
    """,
    48: """
        mlp_dim d_ff alignment_intermediate_size projection_intermediate_size decoder_intermediate_size
    """,
    16: """
        image_size num_patches num_position_embeddings num_embeddings codebook_size num_image_tokens image_seq_length
        num_query_tokens resampler_n_latents latent_query_num num_mel_bins n_mel_bins
    """,
    8: """
        d_kv resampler_head_dim
    """,
    4: """
        patch_size resampler_n_heads attention_heads
    """,
    2: """
        depth layers vision_layers resampler_depth num_global_layers decoder_num_layers
    """,
    1: """
        num_res_blocks num_lstm_layers
    """,
}
_LISTS = {
    "deepstack_visual_indexes": [0, 1],
    "fullatt_block_indexes": [1],
    "global_attn_indexes": [1],
    "intermediate_layers_indices": [0],
}
_ALL_SIZES: dict[str, Any] = SIZES | by_name(_SIZES) | _LISTS

_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_MROPE = {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1]}}}
_PINPOINTS = {"image_grid_pinpoints": [[16, 32], [32, 16]]}
_TILES = {"vision_config": {"patch_size": [4, 4], "image_size": [16, 16]}}
_GLM = {"text_config": {"head_dim": 16, "rope_parameters": {**_ROPE, "mrope_section": [4, 2, 2]}}}
_OMNI = {"vision_start_token_id": VOCABULARY - 2, **_MROPE}
# What the rules above do not make right.
_OWN: dict[str, dict[str, Any]] = {
    "apertus1p5": {
        "vision_config": {"channel_multiplier": [1, 1], "attn_resolutions": []},
        "audio_config": {"decoder_attention_num_groups": 4, "num_filters": 4, "upsampling_ratios": [4, 2]},
        "image_token_offset": VOCABULARY - 33,
        "audio_token_offset": VOCABULARY - 17,
    },
    "chameleon": {
        "vq_config": {"channel_multiplier": [1, 1]},
        "vocabulary_map": {"<image>": VOCABULARY - 1, "IMGIMGAZ": VOCABULARY - 2},
    },
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": _ROPE}}
    },
    "cosmos3_edge": _MROPE,
    "deepseek_ocr2": {
        "vision_config": {"sam_config": {"downsample_channels": [32, 32]}},
        "text_config": {"mlp_layer_types": ["dense", "sparse"], "num_experts_per_tok": 2},
    },
    "diffusion_gemma": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48, "per_layer_config": {}}
    },
    "emu3": {
        "vq_config": {"channel_multiplier": [1, 1]},
        "vocabulary_map": {
            "<image>": VOCABULARY - 1, "<|extra_200|>": VOCABULARY - 2, "<|visual token 000000|>": VOCABULARY - 3
        },
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]},
            "moe_intermediate_size": [48, 32],
        }
    },
    "florence2": {
        "vision_config": {
            "depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
            "patch_prenorm": [False, True], "embed_dim": [16, 32], "num_heads": [2, 4], "num_groups": [2, 4],
            "window_size": 4,
        }
    },
    "glm46v": _MROPE,
    "glm4v": _MROPE,
    "glm4v_moe": {"text_config": {"head_dim": 16, **_MROPE["text_config"]}},
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0, "qk_head_dim": 8, "head_dim": 0}},
    "glm_ocr": _GLM,
    "glmga": merged(_MROPE, {"text_config": {"head_dim": 16, "rope_parameters": {"partial_rotary_factor": 0.5}}}),
    "granite4_vision": {
        "downsample_rate": "2/4", "deepstack_layer_map": [[0, 0]], "spatial_target_layers": [1], **_PINPOINTS,
        "vision_config": {"hidden_size": 64}, "qformer_config": {"hidden_size": 64, "encoder_hidden_size": 64},
    },
    "hunyuan_vl": {"text_config": {"head_dim": 8, "rope_parameters": {**_ROPE, "mrope_section": [1, 1, 1, 1]}}},
    "hy_v4_vl": _MROPE,
    "internvl": _TILES,
    "janus": {"vq_config": {"channel_multiplier": [1, 1]}},
    "llava_next": _PINPOINTS,
    "llava_onevision": _PINPOINTS,
    "mistral4": {"head_dim": 16},
    "mllama": {"vision_config": {"vision_output_dim": 64}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}, "vision_config": {"image_size": [16, 16]}},
    "muse_spark": {
        "audio_config": {
            "patch_sizes": [4, 4], "hidden_sizes": [16, 32], "depths": [1, 1], "num_hidden_layers": 2
        }
    },
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl": _MROPE,
    "qianfan_ocr": _TILES,
    "qwen2_5_omni_thinker": _OMNI,
    "qwen2_5_vl": _MROPE,
    "qwen2_vl": _MROPE,
    "qwen3_omni_moe_thinker": _OMNI,
    "step3p7": {"text_config": {"sliding_window": 64}},
    "vipllava": {"vision_feature_layers": [-1, 0]},
    "unlimited_ocr": {"vision_config": {"sam_config": {"downsample_channels": [32, 32]}}},
}  # fmt: skip


def tiny_vision_config(model_type: str, vocabulary: int = VOCABULARY) -> PreTrainedConfig:
    make = CONFIG_MAPPING[model_type]
    options = shrunk(make().to_dict(), 64, _ALL_SIZES | {"vocab_size": vocabulary})
    return make(**merged(merged(options, OWN.get(model_type, {})), _OWN.get(model_type, {})))


def make_vision_family(model_type: str, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """A random model in float32, in evaluation mode; of :func:`tiny_vision_config` unless a configuration is given."""
    torch.manual_seed(0)
    config = tiny_vision_config(model_type) if config is None else config
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
