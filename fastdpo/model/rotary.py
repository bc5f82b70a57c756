"""Rotary frequencies that follow the longest row so far, held still for a run.

transformers computes the frequencies of the kinds ``dynamic`` (Peng & Quesnelle, "Scaling RoPE") and ``longrope`` (Ding
et al. 2024, arXiv 2402.13753) anew from the rows that come by, so that the same tokens have other log-probabilities
beside, or after, a longer row. What a policy is compared with would then depend on how batches were put together.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fastdpo.model.language_model import described


def fix_frequencies(lm: PreTrainedModel, max_length: int | None) -> str | None:
    """Hold the rotary frequencies of ``lm`` at what they are in a sequence of ``max_length`` tokens.

    Servers that allocate for a longest sequence do so, too. Where no sequence is longer than what the model was first
    trained on, frequencies stay as they are.

    Args:
        lm: a language model, whose modules are changed; its configuration is not.
        max_length: most tokens of a sequence.

    Returns:
        What was done, in words; None if there was nothing to do.

    Raises:
        NotImplementedError: there is something to do, and no ``max_length``, or the weights are not there yet.
    """
    kinds: set[str] = set()
    for module, layer_type, kind in _following(lm):
        name = described(lm)
        if max_length is None:
            raise NotImplementedError(
                f"the rotary frequencies of {name} follow the longest row so far (rope_type {kind!r}), so the same "
                "tokens would have other log-probabilities after a longer row; give max_length (--max_length), and "
                "they are held at what they are in sequences of that length"
            )
        if max_length <= _original_length(module, layer_type):
            continue
        if module.inv_freq.is_meta if layer_type is None else getattr(module, f"{layer_type}_inv_freq").is_meta:
            raise NotImplementedError(
                f"the rotary frequencies of {name} follow the longest row so far (rope_type {kind!r}), and its weights "
                "are not loaded in this process; lower max_length to what the model was first trained on, or load it "
                "in all processes"
            )
        options: dict[str, Any] = {} if layer_type is None else {"layer_type": layer_type}
        inv_freq = getattr(module, "inv_freq" if layer_type is None else f"{layer_type}_inv_freq")
        last = torch.tensor([[max_length - 1]], device=inv_freq.device)
        module(torch.zeros(1, device=inv_freq.device), last, **options)
        if layer_type is None:
            module.rope_type = "default"  # by which the module knows whether to look at its rows
        else:
            module.rope_type = {**module.rope_type, layer_type: "default"}
        kinds.add(kind)
    if not kinds:
        return None
    return (
        f"Rotary frequencies ({', '.join(sorted(kinds))}) are held at those of sequences of {max_length} tokens "
        "(max_length), so that no row depends on the length of others."
    )


def _following(lm: nn.Module) -> Iterator[tuple[Any, str | None, str]]:
    """Modules whose frequencies follow their rows, for which kind of layer (None for all), and how."""
    for module in lm.modules():
        rope_type = getattr(module, "rope_type", None)
        kinds = rope_type if isinstance(rope_type, dict) else {None: rope_type}
        for layer_type, kind in kinds.items():
            if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope"):
                yield module, layer_type, kind


def _original_length(module: Any, layer_type: str | None) -> int:
    """Up to which length the frequencies are the first ones."""
    parameters = module.config.rope_parameters
    parameters = parameters if layer_type is None else parameters[layer_type]
    return int(parameters.get("original_max_position_embeddings") or module.original_max_seq_len)
