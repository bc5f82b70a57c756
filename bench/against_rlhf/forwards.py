"""Counts what goes through a model that is in a trainer's hands, by hooks: padded batches and packed rows alike."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from against_rlhf.ledger import Ledger, forward_flops
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM


@contextlib.contextmanager
def counted(model: LlamaForCausalLM, ledger: Ledger) -> Iterator[None]:
    """Every forward of ``model`` inside a part of ``ledger`` is counted there, with its backward if it records one.

    In the part ``reference`` the tokens are the reference's, and the policy's elsewhere. Recomputed logits are not
    counted: operations are those of the algorithm.
    """
    config = model.config

    def add(tokens: int, flops: float) -> None:
        part = ledger.open_part
        if part is not None:  # an evaluation costs nothing
            name = "reference" if part == "reference" else "policy"
            ledger.count(part, name, tokens=tokens, flops=flops * (3 if torch.is_grad_enabled() else 1))

    def body(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        add(ids.numel(), body_flops(config, ids, kwargs.get("position_ids")))

    def head(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        add(0, forward_flops(config, [], args[0].shape[:-1].numel()))

    def trl_head(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # TRL goes past the output embedding's module. It takes all positions, but on a device with Triton.
        if "labels" in kwargs:
            targets = kwargs["labels"][:, 1:]
            scored = int((targets != -100).sum()) if targets.is_cuda else targets.numel()
            add(0, forward_flops(config, [], scored))

    handles = [
        model.base_model.register_forward_pre_hook(body, with_kwargs=True),
        model.get_output_embeddings().register_forward_pre_hook(head),
        model.register_forward_pre_hook(trl_head, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def body_flops(config: LlamaConfig, ids: Tensor, positions: Tensor | None) -> float:
    """Operations of one forward without the head, of rows ``ids`` int64 [B, T].

    Where several sequences stand in a row, ``positions`` int64 [1, T] jump. A sequence that begins above position 0
    follows a prompt that stands in the row already: it costs what prompt and sequence would, less the prompt.
    """
    rows, width = ids.shape
    if positions is None or rows > 1:
        return forward_flops(config, [width] * rows, 0)
    places = positions[0]
    starts = torch.cat([places.new_zeros(1), 1 + (places.diff() != 1).nonzero()[:, 0]])
    prefixes = places[starts]
    lengths = torch.cat([starts[1:], starts.new_tensor([width])]) - starts
    return forward_flops(config, prefixes + lengths, 0) - forward_flops(config, prefixes, 0)
