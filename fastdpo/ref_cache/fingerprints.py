"""Short names for large things: weights, a tokenizer, a chat template. Equal things have equal fingerprints.

Fingerprints are of values, not of files or storage, so that a model is the same model whether it was loaded from one
file or from ten, in bfloat16 or in float32 with the same values, with an adapter on it or not.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

_CHUNK = 1 << 24  # elements hashed at a time: 64 MB of float32
# What a configuration says about the process, the generation or the training, and not about the function computed.
_IDLE_CONFIG_KEYS = frozenset(
    (
        "_name_or_path",
        "architectures",
        "attn_implementation",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    )
)


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of ``model`` without those of an adapter, under the names that they have without an adapter.

    Parameters are the model's own, so that those which are divided among processes can be told.
    """
    if not isinstance(model, PeftModel):
        return dict(model.state_dict(keep_vars=True))
    prefix = cast(str, model.base_model.prefix)
    weights = {}
    for name, tensor in model.get_base_model().state_dict(keep_vars=True).items():
        parts = name.split(".")
        if any(part == "modules_to_save" or part.startswith(prefix) for part in parts):
            continue
        weights[".".join(part for part in parts if part not in ("base_layer", "original_module"))] = tensor
    return weights


def weights_fingerprint(weights: Mapping[str, Tensor]) -> str:
    """sha256, as 64 hex digits, over names, shapes and values.

    Numbers of 16 bits count as the float32 that they are equal to. Tensors that share memory are read once. Reading
    takes about a second for 2 GB a core. Where one is a DTensor, all processes that hold a part of it have to call
    this together: one tensor at a time is gathered.
    """
    unique: dict[tuple[Any, ...], Tensor] = {}
    keys = {}
    for name, tensor in weights.items():
        place = tensor.to_local().data_ptr() if isinstance(tensor, DTensor) else tensor.data_ptr()
        key = (tensor.device, place, tuple(tensor.shape), tensor.stride(), tensor.dtype)
        keys[name] = key
        unique.setdefault(key, tensor)
    # hashlib lets go of the interpreter's lock. Processes that gather have to do it in one order.
    threads = 1 if any(isinstance(tensor, DTensor) for tensor in unique.values()) else min(16, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads) as pool:
        digests = dict(zip(unique, pool.map(tensor_fingerprint, unique.values()), strict=True))
    return joined_fingerprint({name: digests[key] for name, key in keys.items()})


def joined_fingerprint(digests: Mapping[str, bytes]) -> str:
    """:func:`weights_fingerprint` of tensors of which each has been read: name -> :func:`tensor_fingerprint`."""
    whole = hashlib.sha256()
    for name in sorted(digests):
        whole.update(f"{name}\0".encode() + digests[name])
    return whole.hexdigest()


def tensor_fingerprint(tensor: Tensor) -> bytes:
    """sha256 over the shape and the values of one tensor."""
    widened = tensor.dtype in (torch.bfloat16, torch.float16)
    digest = hashlib.sha256(f"{torch.float32 if widened else tensor.dtype} {tuple(tensor.shape)}".encode())
    tensor = tensor.detach()
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    for chunk in tensor.reshape(-1).split(_CHUNK):
        chunk = chunk.cpu()
        chunk = chunk.float() if widened else chunk
        digest.update(chunk.contiguous().view(torch.uint8).numpy())
    return digest.digest()


def config_facts(config: Any) -> dict[str, Any]:
    """What a model's configuration says about the function that it computes in evaluation, as plain JSON values."""
    values = json.loads(config.to_json_string(use_diff=False))
    return {
        name: value
        for name, value in sorted(values.items())
        if name not in _IDLE_CONFIG_KEYS and "drop" not in name and value is not None
    }


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over what turns text into ids: vocabulary, rules, added tokens, and the token that ends a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    else:
        rules = json.loads(backend.to_str())
        for state_of_the_last_call in ("truncation", "padding"):
            rules.pop(state_of_the_last_call, None)
    return _sha256_of([rules, tokenizer.eos_token])


def image_fingerprint(processor: ProcessorMixin) -> str:
    """sha256 over what turns images into pixels: the class of the image processor, and its settings."""
    images = processor.image_processor
    return _sha256_of([type(images).__name__, json.loads(images.to_json_string())])


def template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """sha256 over the chat template; None if there is none."""
    template = tokenizer.chat_template
    return None if template is None else _sha256_of(template)


def _sha256_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
