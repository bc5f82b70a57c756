"""Vision-language models with their processors, small enough to be made on the spot, and rows with made-up images."""

from __future__ import annotations

from typing import Any

import numpy as np
import tokenizers
import torch
from PIL import Image
from toy_data import SENTENCES
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Gemma3Processor,
    Idefics3Processor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

VISION_FAMILIES = ("llava", "qwen2_5_vl", "gemma3", "idefics3")
VOCABULARY = 384

# What stands for an image in a rendered text.
_PLACEHOLDERS = {
    "llava": "<image>",
    "qwen2_5_vl": "<|vision_start|><|image_pad|><|vision_end|>",
    "gemma3": "<start_of_image>",
    "idefics3": "<image>",
}
_SPECIAL_TOKENS = {
    "llava": ["<image>"],
    "qwen2_5_vl": ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"],
    "gemma3": ["<start_of_image>", "<image_soft_token>", "<end_of_image>"],
    "idefics3": ["<image>", "<fake_token_around_image>", "<end_of_utterance>", "<global-img>"]
    + [f"<row_{i}_col_{j}>" for i in range(1, 4) for j in range(1, 4)],
}
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}PLACEHOLDER{% elif part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}


class ImageProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's, without its video processor, which needs torchvision."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["image_processor", "tokenizer"]


def make_vision_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the special tokens and a chat template of the family."""
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    specials = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", *_SPECIAL_TOKENS[family]]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=specials,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES * 4, trainer)
    extra = {}
    if family == "gemma3":
        extra = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=_SPECIAL_TOKENS[family],
        clean_up_tokenization_spaces=False,
        extra_special_tokens=extra,
    )


def make_processor(family: str) -> ProcessorMixin:
    """A processor for images of 16 pixels, with patches of 4."""
    tokenizer = make_vision_tokenizer(family)
    template = TEMPLATE.replace("PLACEHOLDER", _PLACEHOLDERS[family])
    if family == "llava":
        images = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        return LlavaProcessor(
            images, tokenizer, patch_size=4, vision_feature_select_strategy="default", chat_template=template,
            num_additional_image_tokens=1,
        )  # fmt: skip
    if family == "qwen2_5_vl":
        images = Qwen2VLImageProcessorPil(
            size={"shortest_edge": 8 * 8, "longest_edge": 32 * 32}, patch_size=4, temporal_patch_size=2, merge_size=2
        )
        return ImageProcessor(images, tokenizer, chat_template=template)
    if family == "gemma3":
        images = Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
        return Gemma3Processor(images, tokenizer, chat_template=template, image_seq_length=4)
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}, do_image_splitting=True
    )
    return Idefics3Processor(images, tokenizer, image_seq_len=4, chat_template=template)


def make_vision_model(
    family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **text_options: Any
) -> PreTrainedModel:
    """A random model in evaluation mode, whose logits are spread over some units."""
    ids = make_vision_tokenizer(family).convert_tokens_to_ids
    options: dict[str, Any]
    if family == "llava":
        options = {
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": {"model_type": "clip_vision_model", **_TOWER, "projection_dim": 16},
            "image_token_index": ids("<image>"),
            "vision_feature_layer": -2,
        }
    elif family == "qwen2_5_vl":
        options = {
            "text_config": {
                **_TEXT,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            },
            "vision_config": {
                "depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 4,
                "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 32, "window_size": 16,
                "fullatt_block_indexes": [1],
            },
            "image_token_id": ids("<|image_pad|>"),
            "video_token_id": ids("<|video_pad|>"),
            "vision_start_token_id": ids("<|vision_start|>"),
            "vision_end_token_id": ids("<|vision_end|>"),
        }  # fmt: skip
    elif family == "gemma3":
        options = {
            "text_config": {
                **_TEXT, "query_pre_attn_scalar": 8, "sliding_window": 16,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            "vision_config": {**_TOWER, "vision_use_head": False},
            "mm_tokens_per_image": 4,
            "boi_token_index": ids("<start_of_image>"),
            "eoi_token_index": ids("<end_of_image>"),
            "image_token_index": ids("<image_soft_token>"),
        }  # fmt: skip
    else:
        options = {
            "text_config": {"model_type": "llama", **_TEXT},
            "vision_config": _TOWER,
            "scale_factor": 2,
            "image_token_id": ids("<image>"),
            "pad_token_id": 0,
        }
    options["text_config"] |= text_options
    config = AutoConfig.for_model(family, **options)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=0.3)
        for name, parameter in model.named_parameters():
            # Images must matter to what is said.
            if parameter.dim() > 1 and (
                "vision" in name or "visual" in name or "project" in name or "connector" in name
            ):
                parameter.normal_(std=1.5 / parameter[0].numel() ** 0.5)
    return model


def make_image(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    """Blocks of random colours; ``size`` is width, height."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize(size, Image.Resampling.NEAREST)


def vision_rows(count: int = 12) -> list[dict[str, Any]]:
    """Pairs of message lists about one image each, of different sizes."""
    sizes = [(16, 16), (24, 16), (16, 32), (20, 12)]
    words = len(SENTENCES)
    return [
        {
            "images": [make_image(i, sizes[i % len(sizes)])],
            "prompt": [{"role": "user", "content": f"{SENTENCES[i % words]} {i}"}],
            "chosen": [{"role": "assistant", "content": " ".join(SENTENCES[: 1 + i % 3])}],
            "rejected": [{"role": "assistant", "content": SENTENCES[(i + 1) % words]}],
        }
        for i in range(count)
    ]
