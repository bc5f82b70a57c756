"""Processors for the tiny vision-language families, made by rule; for images of 16 pixels, in patches of 4."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from typing import Any

import tokenizers
import transformers
from tiny_vision import TEMPLATE, VISION_FAMILIES, make_processor, make_vision_model
from tiny_vision_families import make_vision_family, tiny_vision_config
from toy_data import SENTENCES
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

VOCABULARY = 512

# What tokenizers know by these names, and configurations by them with _id or _index.
_NAMED = {
    "image_token": "<image>",
    "video_token": "<video>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<img_context>",
    "image_start_token": "<|image_start|>",
    "image_end_token": "<|image_end|>",
    "video_start_token": "<|video_start|>",
    "video_end_token": "<|video_end|>",
    "image_boundary_token": "<image_boundary>",
    "fake_image_token": "<fake_token_around_image>",
    "end_of_utterance_token": "<end_of_utterance>",
    "global_image_token": "<global-img>",
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_break_token": "<image_break>",
}
_PLAIN = ["<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL"] + [
    f"<row_{i}_col_{j}>" for i in range(1, 4) for j in range(1, 4)
]

# What the rules below do not make right: of image processors, of processors, and what stands for an image in a text.
_PINPOINTS = {"image_grid_pinpoints": [[16, 32], [32, 16]]}
_IMAGE_OPTIONS: dict[str, dict[str, Any]] = {
    "granite4_vision": _PINPOINTS,
    "idefics2": {"size": {"shortest_edge": 8, "longest_edge": 16}},
    "idefics3": {"max_image_size": {"longest_edge": 16}},
    "llava_next": _PINPOINTS,
    "llava_onevision": _PINPOINTS,
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "aya_vision": {"img_size": 16, "downsample_factor": 2},
    "deepseek_vl": {"num_image_tokens": 16},
    "granite4_vision": {"downsample_rate": "2/4"},
    "granite_docling": {"image_seq_len": 1},
    "idefics2": {"image_seq_len": 16},
    "janus": {"num_image_tokens": 16},
    "llava_onevision": {"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
}
_PLACES = {"hunyuan_vl": "<|image_start|><image><|image_end|>", "qianfan_ocr": "<image>"}

# What a run refuses to train on images, and why.
REFUSED = {
    "git": "puts images before the text, beside its tokens",
    "hunyuan_vl": "what it says of a sequence depends on others in its batch",
}

# Families with a processor that can be made so.
PROCESSED = [
    "aya_vision",
    "cosmos3_edge",
    "deepseek_vl",
    "exaone4_5",
    "glm46v",
    "glm4v",
    "glm5_next",
    "granite4_vision",
    "granite_docling",
    "hy_v4_vl",
    "hyperclovax_vision_v2",
    "idefics2",
    "idefics3",
    "internvl",
    "janus",
    "lfm3_vl",
    "lighton_ocr",
    "llava",
    "llava_next",
    "llava_onevision",
    "paddleocr_vl",
    "qianfan_ocr",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_5_moe",
    "qwen3_vl",
    "qwen4_exp",
    "video_llama_3",
    "vipllava",
]


def has_processor(model_type: str) -> bool:
    """Whether a vision-language family's processor can be made here."""
    return model_type in PROCESSED or model_type in VISION_FAMILIES


def with_processor(model_type: str) -> tuple[ProcessorMixin, Callable[[], PreTrainedModel]]:
    """A processor, and what makes a model for it."""
    if model_type in VISION_FAMILIES:
        return make_processor(model_type), lambda: make_vision_model(model_type)
    processor = make_family_processor(model_type)
    config = config_for(model_type, processor)
    return processor, lambda: make_vision_family(model_type, copy.deepcopy(config))


def make_family_processor(model_type: str) -> ProcessorMixin:
    """One of :data:`PROCESSED` or :data:`REFUSED`, of the family's own class, without what is for videos and sounds."""
    kind = getattr(transformers, PROCESSOR_MAPPING_NAMES[model_type])
    parameters = inspect.signature(kind.__init__).parameters
    options: dict[str, Any] = {
        name: value
        for name, value in {
            "patch_size": 4,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "image_seq_length": 4,
            "image_seq_len": 4,
            "num_image_tokens": 4,
        }.items()
        if name in parameters
    }

    class Processor(kind):  # type: ignore[misc, valid-type]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return ["image_processor", "tokenizer"]

    Processor.__name__ = kind.__name__
    made: ProcessorMixin = Processor(
        image_processor=_make_image_processor(model_type),
        tokenizer=_make_tokenizer(),
        **options | _OPTIONS.get(model_type, {}),
    )
    # Two images that touch would be one to those that tell places by the kinds of tokens.
    place = f"<|vision_start|>{getattr(made, 'image_token', '<image>')}<|vision_end|>"
    place = _PLACES.get(model_type, place)
    made.chat_template = TEMPLATE.replace("PLACEHOLDER", place)
    return made


def config_for(model_type: str, processor: ProcessorMixin) -> PreTrainedConfig:
    """The family's tiny configuration with the ids that its processor has."""
    config = tiny_vision_config(model_type, VOCABULARY)
    for part in [config, *(getattr(config, name) for name in config.sub_configs)]:
        for name, value in part.to_dict().items() if part is not None else ():
            token = re.sub(r"_(id|index)$", "", name)
            if token in _NAMED and token != name and isinstance(value, int):
                text = getattr(processor, token, None) or _NAMED[token]
                found = processor.tokenizer.convert_tokens_to_ids(text)
                setattr(part, name, getattr(processor, "image_token_id", found) if token == "image_token" else found)
    return config


def _make_image_processor(model_type: str) -> Any:
    kind = getattr(transformers, IMAGE_PROCESSOR_MAPPING_NAMES[model_type]["pil"])
    options: dict[str, Any] = {}
    for name in ("size", "crop_size"):
        value = getattr(kind, name, None)
        if value and value.keys() == {"shortest_edge", "longest_edge"}:
            options[name] = {"shortest_edge": 8 * 8, "longest_edge": 32 * 32}  # pixels
        elif value:
            options[name] = dict.fromkeys(value, 32 if value.keys() == {"longest_edge"} else 16)
    patch = getattr(kind, "patch_size", None)
    if patch is not None:
        options["patch_size"] = dict.fromkeys(patch, 4) if isinstance(patch, dict) else 4
    return kind(**options | _IMAGE_OPTIONS.get(model_type, {}))


def _make_tokenizer() -> PreTrainedTokenizerFast:
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    usual = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[*usual, *_NAMED.values(), *_PLAIN],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=_PLAIN,
        extra_special_tokens=_NAMED,
        clean_up_tokenization_spaces=False,
    )
