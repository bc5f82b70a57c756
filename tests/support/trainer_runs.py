"""Small runs of the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_models import make_model
from torch import Tensor, nn
from toy_data import text_rows
from transformers import TrainerCallback

from fastdpo.trainer import DPOConfig, DPOTrainer

METRICS = {
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "logits/chosen",
    "logits/rejected",
    "entropy",
    "mean_token_accuracy",
}
# A sum of some 50 log-probabilities of about -6, in float32, in another order.
LOGP_TOLERANCE = 50 * 6 * torch.finfo(torch.float32).eps


def config(output_dir: Path, **options: Any) -> DPOConfig:
    defaults = {
        "use_cpu": True,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return DPOConfig(str(output_dir), **(defaults | options))


def make_trainer(output_dir: Path, tokenizer: Any, *, rows: int = 6, **options: Any) -> DPOTrainer:
    arguments = {
        name: options.pop(name)
        for name in ("model", "ref_model", "train_dataset", "eval_dataset", "peft_config", "callbacks", "data_collator")
        if name in options
    }
    arguments = {"model": make_model("llama"), "train_dataset": Dataset.from_list(text_rows(rows))} | arguments
    return DPOTrainer(args=config(output_dir, **options), processing_class=tokenizer, **arguments)


class GradientRecorder(TrainerCallback):
    """Keeps each optimiser step's gradients."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **_: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
