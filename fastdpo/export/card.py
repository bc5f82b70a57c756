"""The model card of a merged model."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard, ModelCardData

from fastdpo.data.visible import code_span, in_markdown
from fastdpo.export.likeness import Difference
from fastdpo.export.merged_model import MergedModel
from fastdpo.trainer.model_card import CARD_FILE, TAGS, is_hub_id
from fastdpo.trainer.secrets import redacted


def write_card(part: Path, name: str, merged: MergedModel, dtype: torch.dtype, apart: Difference) -> None:
    """Write README.md: what was merged into what, how far it is from the live model, and the Hub's metadata.

    Args:
        part: where.
        name: the model's.
        merged: what it was made of.
        dtype: what its weights are stored in.
        apart: the stored model from the live one.
    """
    source = merged.source
    known: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": sorted(TAGS)}
    if is_hub_id(source.base):
        known |= {"base_model": source.base, "base_model_relation": "finetune"}
    adapters = " and ".join(code_span(adapter) for adapter in source.adapters)
    quantized = dict(source.quantization)
    kind = quantized.get("bnb_4bit_quant_type", "nf4")
    how = f", whose weights are those that it has in 4 bits ({kind})" if quantized else ""
    lines = [
        f"# {in_markdown(name)}",
        f"The adapter {adapters} merged into {code_span(source.base)}{how} by fastdpo {version('fastdpo')}.",
        f"Stored in {str(dtype).removeprefix('torch.')}. Log-probabilities of {len(merged.logps)} tokens are {apart} "
        f"from those of the adapter on its base in float32; what the adapter changes of them is {merged.effect}.",
    ]
    if merged.was_untied:
        lines.append("Input and output embedding, which are one in the base, are two here: the adapter changes one.")
    card = ModelCard(f"---\n{ModelCardData(**known).to_yaml()}\n---\n\n{redacted(chr(10).join(_spaced(lines)))}")
    card.save(part / CARD_FILE)


def _spaced(lines: list[str]) -> list[str]:
    return [line for pair in ((line, "") for line in lines) for line in pair]
