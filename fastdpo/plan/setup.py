"""What is to be trained, and how: what decides a run's memory beside its batches."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from transformers import PreTrainedConfig

# Where the reference's log-probabilities come from: another model, the policy without its adapter, the disk (or the
# dataset), nowhere.
REFERENCES = ("model", "adapter", "cache", "none")


@dataclass(frozen=True)
class Setup:
    """A run, as far as its memory goes.

    Attributes:
        config: of the model.
        dtype: of its weights, their gradients and the optimiser's state.
        autocast: what layers compute in, where it is something else; None where not.
        peft_config: of the adapter; None where the model itself is trained.
        bits: of the model's weights under the adapter: 4, 8, or None where they are of ``dtype``.
        bits_compute: what layers of such weights compute in.
        nested: the scales of 4 bits are quantised as well.
        checkpointing: activations are computed again in the backward.
        checkpointing_kwargs: for ``activation_checkpointing_enable``.
        offloading: what activations are kept goes to the host's memory.
        reference: one of ``REFERENCES``.
        optim: of ``--optim``.
        device: ``cpu``, or what an accelerator is called.
        attn_implementation: what the model is loaded with; None for its default.
        trust_remote_code: the model's own code may run.
        outputs: what metrics the head computes beside log-probabilities.
    """

    config: PreTrainedConfig
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    peft_config: PeftConfig | None = None
    bits: int | None = None
    bits_compute: torch.dtype = torch.float32
    nested: bool = False
    checkpointing: bool = True
    checkpointing_kwargs: dict[str, Any] = field(default_factory=dict)
    offloading: bool = False
    reference: str = "model"
    optim: str = "adamw_torch_fused"
    device: str = "cpu"
    attn_implementation: str | None = None
    trust_remote_code: bool = False
    outputs: tuple[str, ...] = ("entropy", "mean_logits", "is_top1")

    def __post_init__(self) -> None:
        if self.reference not in REFERENCES:
            raise ValueError(f"reference is {self.reference!r}; it should be one of {', '.join(REFERENCES)}")
        if self.bits and self.peft_config is None:
            raise ValueError(f"weights in {self.bits} bits cannot be trained themselves; give a peft_config")
        if self.reference == "adapter" and self.peft_config is None:
            raise ValueError("reference is 'adapter', and there is none; give a peft_config")

    @property
    def method(self) -> str:
        """``full``, ``LoRA`` or ``QLoRA``."""
        if self.peft_config is None:
            return "full"
        return f"QLoRA ({self.bits} bits)" if self.bits else "LoRA"
