from __future__ import annotations

import pytest
from tiny_families import FAMILIES, LENGTHS, NOT_MADE, tiny_config
from transformers import AutoConfig

from fastdpo.model.config_lengths import lengths_in, longest_position


@pytest.mark.parametrize(
    ("model_type", "options", "lengths"),
    [
        ("llama", {}, []),
        ("mistral", {"sliding_window": 37}, [37]),
        ("llama4_text", {"floor_scale": 64, "attention_chunk_size": 96}, [64, 96]),
        ("modernbert-decoder", {"local_attention": 19}, [19]),
        (
            "phi3",
            {
                "original_max_position_embeddings": 61,
                "max_position_embeddings": 64,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 10_000.0,
                    "short_factor": [1.0] * 4,
                    "long_factor": [2.0] * 4,
                    "original_max_position_embeddings": 61,
                },
            },
            [61],
        ),
    ],
)
def test_what_counts_tokens_is_found_however_deep(model_type, options, lengths):
    config = tiny_config(model_type, length=1, **options)
    assert [length for length in lengths_in(config) if length > 16] == lengths


def test_no_length_of_the_tiny_families_is_missed():
    for model_type in sorted(set(FAMILIES) - set(NOT_MADE)):
        config = tiny_config(model_type, length=77).get_text_config()
        names = {name for name in LENGTHS if getattr(config, name, None) == 77}
        assert not names or 77 in lengths_in(config), (model_type, names)


def test_widths_and_counts_are_no_lengths():
    config = AutoConfig.for_model("qwen3_moe")
    assert not set(lengths_in(config)) & {config.hidden_size, config.vocab_size, config.moe_intermediate_size}
    assert not set(lengths_in(config)) & {config.num_experts, config.max_position_embeddings}


def test_positions_that_a_model_has():
    assert longest_position(AutoConfig.for_model("gpt2", n_positions=100)) == 92  # some begin after the first
    assert longest_position(AutoConfig.for_model("mamba")) is None
