"""Bases and adapters of every kind, tiny, random, and trained enough to say something else than their base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from tiny_models import make_model
from transformers import AutoModelForCausalLM

SIZE = 384
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Twelve kinds; "rows" is how many rows the embeddings are resized to before.
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {"target_modules": LINEAR},
    "rsLoRA": {"target_modules": LINEAR, "use_rslora": True, "lora_alpha": 3, "rank_pattern": {"q_proj": 2}},
    "DoRA": {"target_modules": LINEAR, "use_dora": True},
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA on both embeddings": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "the head saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding and norms saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]},
    "trainable tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 11, 380]},
    "resized": {"target_modules": ["q_proj"], "rows": SIZE + 6},
    "resized, the new tokens trained": {
        "target_modules": ["q_proj"],
        "trainable_token_indices": list(range(SIZE, SIZE + 3)),
        "rows": SIZE + 3,
    },
    "resized, both embeddings saved": {
        "target_modules": LINEAR,
        "modules_to_save": ["embed_tokens", "lm_head"],
        "rows": SIZE + 6,
    },
}


def make_base(folder: Path, model_type: str = "llama", *, dtype: torch.dtype = torch.float32, **options: Any) -> Path:
    """A folder with a random model."""
    make_model(model_type, SIZE, dtype=dtype, **options).save_pretrained(folder)
    return folder


def make_adapter(
    folder: Path,
    base: Path,
    config: PeftConfig | None = None,
    *,
    rows: int | None = None,
    seed: int = 7,
    **options: Any,
) -> Path:
    """A folder with an adapter: LoRA of these options, or of a configuration; every weight that it trains is moved."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if rows is not None:
        model.resize_token_embeddings(rows)
    torch.manual_seed(seed)
    model = get_peft_model(model, config or LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder
