"""Layers that carry a state from token to token: state spaces, linear attention, short convolutions.

Attention of ours keeps the sequences of a packed row apart. Such layers do it by themselves, where the kernels that
they run on can, and are told where sequences begin: in the keyword arguments that transformers has for it, which its
models hand on to mamba-ssm, causal-conv1d and flash-linear-attention. A state cannot be shared by two completions, so
every sequence comes with its own prompt. Whether the bounds are kept is not taken on trust: see
:mod:`fastdpo.model.packing_check`.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import PreTrainedModel

from fastdpo.model.segments import Segments

# Kinds of layers, as configurations name them, that carry a state, alone ("linear_attention", "conv") or beside
# attention ("hybrid").
STATEFUL = frozenset({"linear_attention", "conv", "hybrid", "hybrid_sliding"})
# What may keep the sequences of a row apart: these, and the kinds in which no tokens meet.
SEPARABLE = STATEFUL | {"mlp", "moe"}

# Their linear attention is called with the model's keyword arguments as they are, and knows the bounds by the name that
# flash-linear-attention has for them.
_BY_KERNELS_NAME = frozenset({"bailing_hybrid", "kimi_linear"})

# What transformers says where a kernel's package is missing, and its own code cannot keep sequences apart.
_MISSING = re.compile(r"can't keep packed sequences apart without `([\w-]+)`")


def kinds_of_layers(lm: PreTrainedModel) -> frozenset[str]:
    """The kinds of layers of ``lm``, as its configuration names them; empty where it names none."""
    return frozenset(getattr(lm.config.get_text_config(), "layer_types", None) or ())


def stateful_kinds(lm: PreTrainedModel) -> frozenset[str]:
    """Those that carry a state from token to token."""
    return STATEFUL & kinds_of_layers(lm)


def sequence_bounds(lm: PreTrainedModel, segments: Segments) -> dict[str, Any]:
    """The keyword arguments that tell layers with a state where the sequences of a row are; empty without such layers.

    Args:
        lm: the language model.
        segments: of the row; each a whole sequence.

    Returns:
        ``seq_idx``, [1, N] int32, which sequence a token is of; ``cu_seq_lens_q`` and ``cu_seq_lens_k``, [S + 1] int32,
        the sequences' bounds; ``max_length_q`` and ``max_length_k``, the longest one's tokens. Where the model needs
        it, ``cu_seqlens``, which is ``cu_seq_lens_q``.
    """
    if not stateful_kinds(lm):
        return {}
    lengths = segments.cu_q.diff()
    index = torch.arange(len(lengths), dtype=torch.int32, device=lengths.device)
    bounds = {
        "seq_idx": index.repeat_interleave(lengths, output_size=segments.length)[None],
        "cu_seq_lens_q": segments.cu_q,
        "cu_seq_lens_k": segments.cu_q,
        "max_length_q": segments.max_q,
        "max_length_k": segments.max_q,
    }
    if lm.config.get_text_config().model_type in _BY_KERNELS_NAME:
        bounds["cu_seqlens"] = segments.cu_q
    return bounds


def missing_package(error: Exception) -> str | None:
    """The package without which a model that stopped with this error does not keep sequences apart."""
    found = _MISSING.search(str(error))
    return found[1] if found else None
