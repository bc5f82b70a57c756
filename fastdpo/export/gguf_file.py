"""A model in a GGUF file, for llama.cpp and what is built on it: written, read back by transformers, and compared."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.import_utils import is_gguf_available

from fastdpo.export.folder import check_parents
from fastdpo.export.gguf_layout import Layout, layout_of, tensors_of
from fastdpo.export.gguf_tokenizer import GGUFTokenizer, gguf_tokenizer
from fastdpo.export.likeness import Difference, Kept, difference, logps_of, tolerance
from fastdpo.export.live import MergeError
from fastdpo.export.merged_model import MergedModel
from fastdpo.model.generation import configured_ends
from fastdpo.model.language_model import embedding_rows
from fastdpo.ref_cache.durable import UNFINISHED
from fastdpo.trainer.digests import flush_to_disk
from fastdpo.trainer.disk import NotWrittenError, free_bytes, size_in_words, why_not_written

_BITS = {"f32": 32, "f16": 16, "bf16": 16, "q8_0": 8.5}
_BLOCK = 32  # weights of a row that share a scale in q8_0
# Settings that transformers reads from a file of these architectures, and are compared: its name -> GGUF's.
_READ = {
    "max_position_embeddings": "context_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "hidden_size": "embedding_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "vocab_size": "vocab_size",
}
_SENTENCES = ("The sky over the harbour, at 10:45!", "  Two  spaces\n\nand lines.", "Ünïcode, 漢字 and 🙂")


def check_gguf(path: Path, *, overwrite: bool) -> None:
    """Raises MergeError where the package is missing, or the file may not be written."""
    if not is_gguf_available():
        raise MergeError("--gguf needs the package gguf: pip install gguf")
    check_parents(path)
    if path.is_dir():
        raise MergeError(f"{path} is a folder; --gguf takes a file's name")
    if path.exists() and not overwrite:
        raise MergeError(f"{path} exists; name another file, or give --overwrite_output_dir")


def write_gguf(
    merged: MergedModel, path: Path, tokenizer: PreTrainedTokenizerBase, kind: str
) -> tuple[Difference, Kept | None]:
    """Write a model to ``path``, and compare what transformers reads back.

    Args:
        merged: the model, in float32; it stays as it is.
        path: of the file, which is there whole or not at all.
        tokenizer: of the model.
        kind: what matrices are stored in: ``f32``, ``f16``, ``bf16`` or ``q8_0``; vectors stay in float32.

    Returns:
        How far the log-probabilities of what is read back are from the live model's; and, where it is rounded, what is
        kept of the adapter.

    Raises:
        MergeError: the model, its tokenizer or a weight has no counterpart, or what is read back is something else.
        NotWrittenError: the disk is full.
    """
    model = merged.model
    layout = layout_of(model)
    words = gguf_tokenizer(tokenizer, embedding_rows(model))
    _check_ends(model, words)
    _check_room(model, path, kind)
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{UNFINISHED}{path.name}")
    try:
        _write(model, layout, words, draft, kind, path.stem)
        found = _compare(merged, layout, words, tokenizer, draft, kind)
        flush_to_disk(draft)
        os.replace(draft, path)
    except Exception as error:
        if (why := why_not_written(error)) is None:
            raise
        raise NotWrittenError(f"{path} could not be written: {why}; nothing of it is left") from error
    finally:
        draft.unlink(missing_ok=True)
    return found


def _check_ends(model: PreTrainedModel, words: GGUFTokenizer) -> None:
    """Raises MergeError where llama.cpp would take a token of another vocabulary for one that is not there."""
    if "eos" not in words.ids and not configured_ends(model):
        raise MergeError(
            "--gguf: neither the tokenizer (eos_token) nor the model's generation_config (eos_token_id) says what ends "
            "a text, and llama.cpp would take the token of another vocabulary for it. Set one of the two and save it"
        )
    for name in ("bos", "eos"):
        if name not in words.ids and f"{name}_token" in (words.chat_template or ""):
            raise MergeError(
                f"--gguf: the chat template writes {name}_token, and the tokenizer has none: llama.cpp would write the "
                "token of another vocabulary. Set it, or take it out of the template"
            )


def _check_room(model: PreTrainedModel, path: Path, kind: str) -> None:
    needed = int(sum(parameter.numel() for parameter in model.parameters()) * _BITS[kind] / 8) + 20_000_000
    if (free := free_bytes(path.parent)) < needed:
        raise NotWrittenError(
            f"{path} was not begun: the model takes {size_in_words(needed)}, and {size_in_words(free)} are free there"
        )


def _write(model: PreTrainedModel, layout: Layout, words: GGUFTokenizer, path: Path, kind: str, name: str) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, layout.architecture)
    writer.add_name(name)
    writer.add_file_type(
        {
            "f32": gguf.LlamaFileType.ALL_F32,
            "f16": gguf.LlamaFileType.MOSTLY_F16,
            "bf16": gguf.LlamaFileType.MOSTLY_BF16,
            "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
        }[kind]
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in layout.values.items():
        if isinstance(value, float):
            writer.add_float32(f"{layout.architecture}.{key}", value)
        else:
            writer.add_uint32(f"{layout.architecture}.{key}", value)
    if "rope.scaling.factor" in layout.values:
        writer.add_string(f"{layout.architecture}.rope.scaling.type", "linear")
    _add_tokenizer(writer, words, model)
    for tensor_name, tensor in tensors_of(model, layout):
        stored, dtype = _stored(tensor_name, tensor, kind)
        writer.add_tensor(tensor_name, stored, raw_dtype=dtype)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_tokenizer(writer: Any, words: GGUFTokenizer, model: PreTrainedModel) -> None:
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    if words.merges:
        writer.add_token_merges(words.merges)
    if words.scores:
        writer.add_token_scores(words.scores)
    for name, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("unk", writer.add_unk_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        if name in words.ids:
            add(words.ids[name])
    others = sorted(configured_ends(model) - {words.ids.get("eos")})
    if others and "eos" not in words.ids:  # or llama.cpp takes the end of another vocabulary
        writer.add_eos_token_id(others.pop(0))
    if others:
        writer.add_eot_token_id(others[0])
    for name, value in words.flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    if words.chat_template:
        writer.add_chat_template(words.chat_template)


def _stored(name: str, value: Tensor, kind: str) -> tuple[np.ndarray, Any]:
    import gguf

    array = np.ascontiguousarray(value.cpu().numpy())
    if array.ndim == 1 or kind == "f32":
        return array, gguf.GGMLQuantizationType.F32
    if kind == "q8_0" and array.shape[-1] % _BLOCK:
        kind = "f16"
    if kind == "f16" and np.abs(array).max(initial=0) > np.finfo(np.float16).max:
        raise MergeError(f"--gguf_type f16 does not reach to the values of {name}; give bf16 or f32")
    dtype = gguf.GGMLQuantizationType[kind.upper()]
    return (array.astype(np.float16) if kind == "f16" else gguf.quantize(array, dtype)), dtype


def _compare(
    merged: MergedModel,
    layout: Layout,
    words: GGUFTokenizer,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    kind: str,
) -> tuple[Difference, Kept | None]:
    where: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    read = AutoConfig.from_pretrained(path.parent, **where)
    wrong = {ours for ours, key in _READ.items() if not np.isclose(getattr(read, ours), layout.values[key])}
    is_tied = not any(name == "output.weight" for name, _ in tensors_of(merged.model, layout))
    if bool(read.tie_word_embeddings) != is_tied:
        wrong.add("tie_word_embeddings")
    if wrong:
        raise MergeError(f"transformers reads other settings back from {path.name}: {', '.join(sorted(wrong))}")
    _compare_tokenizers(words, tokenizer, path.parent, where)
    # What transformers does not read of these architectures (head_dim, softcaps, rotary scaling) is the model's own.
    auto: Any = type(merged.model)
    config: Any = copy.deepcopy(merged.model.config)
    if config.model_type == "mistral":  # a Llama, within its window, to llama.cpp and so in the file
        auto, config = LlamaForCausalLM, LlamaConfig(**{**config.to_dict(), "model_type": "llama"})
    loaded, info = auto.from_pretrained(
        path.parent, config=config, dtype=torch.float32, output_loading_info=True, **where
    )
    lost = {key for kinds in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in map(str, info[kinds])}
    if lost:
        raise MergeError(f"transformers does not find all weights in {path.name}: {', '.join(sorted(lost)[:4])}")
    logps, largest = logps_of(loaded.eval(), merged.rows)
    apart = difference(merged.logps, logps)
    if kind != "f32":
        return apart, merged.check_kept(logps, kind, "Give --gguf_type f16 or f32; or serve the adapter by itself")
    allowed = tolerance(merged.model, largest)
    if not apart.largest <= allowed:
        raise MergeError(
            f"transformers reads another model back from the file: log-probabilities differ by {apart}, where the "
            f"order of sums explains {allowed:.2g}; nothing was kept"
        )
    return apart, None


def _compare_tokenizers(
    words: GGUFTokenizer, tokenizer: PreTrainedTokenizerBase, folder: Path, where: dict[str, Any]
) -> None:
    """Raises MergeError where what is read back has other tokens, or makes other ids of some texts."""
    read = AutoTokenizer.from_pretrained(folder, **where)
    found, expected = read.get_vocab(), tokenizer.get_vocab()
    if other := [token for token, i in expected.items() if found.get(token) != i]:
        raise MergeError(f"transformers reads other tokens back from the file: {', '.join(map(repr, other[:4]))}")
    if words.pre in ("gpt-2", "smollm"):  # a way of cutting that transformers does not read
        return
    # Before a text that begins with a space, llama.cpp puts another one, and transformers' class of a Llama does not.
    for text in _SENTENCES if words.model == "gpt2" else map(str.strip, _SENTENCES):
        ids = (tokenizer(text, add_special_tokens=False).input_ids, read(text, add_special_tokens=False).input_ids)
        if ids[0] != ids[1]:
            raise MergeError(
                f"transformers reads back a tokenizer that makes other ids of {text!r}: {ids[1]}, not {ids[0]}"
            )
