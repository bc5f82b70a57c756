"""GGUF files: what transformers reads back says what the adapter on its base said, with the tokens that it had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from made_adapters import make_adapter, make_base
from tiny_models import make_model
from tokenizers import normalizers, pre_tokenizers
from toy_data import CHAT_TEMPLATE, SENTENCES, make_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

gguf = pytest.importorskip("gguf")

from fastdpo.export import gguf_layout  # noqa: E402
from fastdpo.export.gguf_file import write_gguf  # noqa: E402
from fastdpo.export.gguf_layout import layout_of  # noqa: E402
from fastdpo.export.gguf_tokenizer import gguf_tokenizer  # noqa: E402
from fastdpo.export.live import MergeError, source_of  # noqa: E402
from fastdpo.export.merged_model import MergedModel, make_merged  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama, tied, biases": ("llama", {"tie_word_embeddings": True, "attention_bias": True}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama, linear": ("llama", {"rope_parameters": LINEAR_ROPE}),
    "mistral": ("mistral", {"sliding_window": 96}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {"tie_word_embeddings": True, "attn_logit_softcapping": 5.0}),
    "gemma3": ("gemma3_text", {"num_hidden_layers": 6, "final_logit_softcapping": None}),
}


def merged(folder: Path, model_type: str, **options: Any) -> MergedModel:
    base = make_base(folder / "base", model_type, **options)
    head = [] if model_type == "gemma2" else ["lm_head"]  # llama.cpp has no Gemma 2 whose embeddings are two
    adapter = make_adapter(folder / "adapter", base, target_modules=["q_proj", "k_proj", *head])
    return make_merged(source_of([str(adapter)]))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_read_back_says_the_same(name: str, tmp_path: Path) -> None:
    model_type, options = MODELS[name]
    model = merged(tmp_path, model_type, **options)
    assert model.effect is not None and model.effect.largest > 1e-2
    apart, _ = write_gguf(model, tmp_path / "m.gguf", make_tokenizer(), "f32")
    print(f"{name:20} {apart.largest:.1e}")
    assert apart.largest <= 1e-5
    assert [path.name for path in tmp_path.glob("*.gguf")] == ["m.gguf"]
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["general.architecture"].contents() == layout_of(model.model).architecture
    if name == "mistral":
        assert fields["llama.context_length"].contents() == 96  # within its window


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_types(kind: str, tmp_path: Path) -> None:
    model = merged(tmp_path, "qwen2", intermediate_size=64)
    sizes = {}
    for each in (kind, "f32"):
        apart, kept = write_gguf(model, tmp_path / f"{each}.gguf", make_tokenizer(), each)
        assert kept is None or kept.share == pytest.approx(1, abs=0.1)
        sizes[each] = sum(tensor.data.nbytes for tensor in gguf.GGUFReader(tmp_path / f"{each}.gguf").tensors)
    bits = {"f16": 16, "bf16": 16, "q8_0": 8.5}[kind]
    assert sizes[kind] == pytest.approx(sizes["f32"] * bits / 32, rel=0.05)  # vectors stay as they are
    assert apart.largest <= 1e-5


def test_rows_that_are_no_blocks_and_values_out_of_reach(tmp_path: Path) -> None:
    model = merged(tmp_path, "llama")  # 48 columns in down_proj
    write_gguf(model, tmp_path / "m.gguf", make_tokenizer(), "q8_0")
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert types["blk.0.ffn_down.weight"] == "F16" and types["blk.0.ffn_up.weight"] == "Q8_0"
    assert types["output_norm.weight"] == "F32"
    with torch.no_grad():
        model.model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(MergeError, match=r"f16 does not reach to the values of blk\.0\.ffn_up\.weight"):
        write_gguf(model, tmp_path / "n.gguf", make_tokenizer(), "f16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "m.gguf"]


def test_an_adapter_that_rounding_would_lose(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen2", dtype=torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], lora_alpha=1e-4)
    model = make_merged(source_of([str(adapter)]))
    with pytest.raises(MergeError, match=r"in bf16, -?\d+ ± \d+ % is kept .*--gguf_type f16 or f32"):
        write_gguf(model, tmp_path / "m.gguf", make_tokenizer(), "bf16")
    assert not list(tmp_path.glob("*.gguf"))


@pytest.mark.parametrize("wrong", ["permutation", "norms"])
def test_a_wrong_mapping_is_found(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = merged(tmp_path, "llama" if wrong == "permutation" else "gemma2")
    if wrong == "permutation":
        monkeypatch.setattr(gguf_layout, "_interleaved", lambda value, heads: value)
    else:
        original = gguf_layout.tensors_of
        shifted = lambda model, layout: ((n, v - 1 if v.dim() == 1 else v) for n, v in original(model, layout))  # noqa: E731
        monkeypatch.setattr("fastdpo.export.gguf_file.tensors_of", shifted)
    with pytest.raises(MergeError, match="reads another model back from the file"):
        write_gguf(model, tmp_path / "m.gguf", make_tokenizer(), "f32")
    assert not list(tmp_path.glob("*.gguf"))


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gpt2": ("gpt2", {}, "no mapping for models of the type 'gpt2', only for gemma2, "),
    "yarn": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        "has rotary frequencies of the kind yarn, and llama.cpp's llama computes otherwise",
    ),
    "window": ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0}, "a sliding window"),
    "activation": ("llama", {"hidden_act": "relu"}, "has the activation relu"),
    "scale": ("gemma2", {"query_pre_attn_scalar": 16}, "scales queries by 16"),
    "layers": ("gemma2", {"layer_types": ["full_attention"] * 2}, "full attention in other layers than each 2th"),
    # llama.cpp has factors of the frequencies for Llama alone, and reads a file of another family without them.
    "frequencies": ("qwen3", {"rope_parameters": LLAMA3_ROPE}, "has rotary frequencies of the kind llama3"),
    "frequencies of some layers": (
        "gemma3_text",
        {"num_hidden_layers": 6, "rope_parameters": {"full_attention": LLAMA3_ROPE, "sliding_attention": PLAIN_ROPE}},
        "has rotary frequencies of the kind llama3",
    ),
    "frequencies within windows": (
        "gemma3_text",
        {"num_hidden_layers": 6, "rope_parameters": {"full_attention": PLAIN_ROPE, "sliding_attention": LINEAR_ROPE}},
        "has rotary frequencies of the kind linear in layers with a window",
    ),
    "biases": (
        "qwen3",
        {"attention_bias": True},
        "has biases in its attention, and llama.cpp's qwen3 computes otherwise",
    ),
    "no bounds of logits": (
        "gemma3_text",
        {"num_hidden_layers": 6, "attn_logit_softcapping": 50.0},
        "has attn_logit_softcapping 50.0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_without_a_mapping(name: str) -> None:
    model_type, options, told = REFUSED[name]
    with pytest.raises(MergeError, match=told):
        layout_of(make_model(model_type, **options))


def test_a_gemma_2_without_bounds_of_its_logits() -> None:
    """llama.cpp bounds them by 30 where a file does not say by what."""
    model = make_model("gemma2")
    model.config.final_logit_softcapping = None
    with pytest.raises(MergeError, match="has no final_logit_softcapping"):
        layout_of(model)


@pytest.mark.parametrize("ends", [None, 2, 5, [2], [2, 5], [5, 2]])
def test_what_ends_a_turn(ends: int | list[int] | None, tmp_path: Path) -> None:
    """Beside the tokenizer's end, 2, what the model's generation ends at; or a server of the file goes on and on."""
    model = make_merged_of(make_model("llama"), tmp_path)
    model.model.generation_config.eos_token_id = ends
    write_gguf(model, tmp_path / "m.gguf", make_tokenizer(), "f32")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    eot = fields.get("tokenizer.ggml.eot_token_id")
    assert (eot and eot.contents()) == (None if ends in (None, 2, [2]) else 5)


@pytest.mark.parametrize("ends", [None, 5])
def test_what_ends_a_text_has_to_be_known(ends: int | None, tmp_path: Path) -> None:
    """Or llama.cpp takes token 11 for it, which here is a letter."""
    model = make_merged_of(make_model("llama"), tmp_path)
    model.model.generation_config.eos_token_id = ends
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    if ends is None:
        with pytest.raises(MergeError, match=r"neither the tokenizer \(eos_token\) nor the model's generation_config"):
            write_gguf(model, tmp_path / "m.gguf", tokenizer, "f32")
    else:
        write_gguf(model, tmp_path / "m.gguf", tokenizer, "f32")
        assert gguf.GGUFReader(tmp_path / "m.gguf").fields["tokenizer.ggml.eos_token_id"].contents() == 5
        tokenizer.chat_template = "{{ messages[0].content }}{{ eos_token }}"
        with pytest.raises(MergeError, match="the chat template writes eos_token, and the tokenizer has none"):
            write_gguf(model, tmp_path / "n.gguf", tokenizer, "f32")
    assert not (tmp_path / "n.gguf").exists()


# --------------------------------------------------------------------------------------------------------------------
# Tokenizers
# --------------------------------------------------------------------------------------------------------------------


def cut_by(*steps: Any, normalizer: Any = None) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(steps)) if len(steps) > 1 else steps[0]
    tokenizer.backend_tokenizer.normalizer = normalizer
    return tokenizer


def split(regex: str) -> list[Any]:
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return [pre_tokenizers.Split(tokenizers.Regex(regex), behavior="isolated"), bytes_alone]


def cut(name: str) -> str:
    from fastdpo.export.gguf_tokenizer import _CUTS

    return next(regex for regex, known in _CUTS.items() if known == name)


def sentence_pieces(size: int = 384) -> PreTrainedTokenizerFast:
    """As Llama 2's: spaces are characters, and bytes stand for what is not in the vocabulary."""
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "<|im_end|>"]
    core = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, special_tokens=specials, show_progress=False)
    core.train_from_iterator(SENTENCES * 4, trainer)
    core = tokenizers.Tokenizer.from_str(_without_special_bytes(core.to_str()))
    core.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    core.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _without_special_bytes(text: str) -> str:
    known = json.loads(text)
    known["added_tokens"] = [entry for entry in known["added_tokens"] if not entry["content"].startswith("<0x")]
    return json.dumps(known)


KNOWN_CUTS: dict[str, Any] = {
    "gpt-2": lambda: make_tokenizer(),
    "smollm": lambda: cut_by(pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)),
    "llama-bpe": lambda: cut_by(*split(cut("llama-bpe"))),
    "qwen2": lambda: cut_by(*split(cut("qwen2")), normalizer=normalizers.NFC()),
    "tekken": lambda: cut_by(*split(cut("tekken"))),
}


@pytest.mark.parametrize("name", KNOWN_CUTS)
def test_byte_level_tokenizers(name: str, tmp_path: Path) -> None:
    tokenizer = KNOWN_CUTS[name]()
    tokenizer.add_tokens(["<think>"])
    rows = len(tokenizer) + 3
    words = gguf_tokenizer(tokenizer, rows)
    assert (words.model, words.pre, len(words.tokens), len(words.types)) == ("gpt2", name, rows, rows)
    assert words.types[0] == 3 and words.types[rows - 4] == 4 and words.types[-3:] == [5, 5, 5]
    assert words.ids == {"bos": 1, "eos": 2, "pad": 0} and words.chat_template == CHAT_TEMPLATE
    assert words.flags == {"add_bos_token": False, "add_eos_token": False}
    base = make_model("llama", rows)
    model = make_merged_of(base, tmp_path)
    write_gguf(model, tmp_path / "m.gguf", tokenizer, "f32")
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    assert read.chat_template == CHAT_TEMPLATE
    if name not in ("gpt-2", "smollm"):  # of which transformers does not read how they cut
        for text in [*SENTENCES, "<s> a<think>b 12345 </s>"]:
            assert read(text, add_special_tokens=False).input_ids == tokenizer(text).input_ids


def make_merged_of(model: Any, folder: Path) -> MergedModel:
    model.save_pretrained(folder / "model")
    return make_merged(source_of([str(folder / "model")]))


def test_sentence_pieces(tmp_path: Path) -> None:
    tokenizer = sentence_pieces()
    words = gguf_tokenizer(tokenizer, len(tokenizer))
    assert words.model == "llama" and words.merges == [] and len(words.scores) == len(tokenizer)
    assert (words.types[0], words.types[1], words.types[3]) == (2, 3, 6)
    assert words.flags == {"add_bos_token": True, "add_eos_token": False, "add_space_prefix": True}
    model = make_merged_of(make_model("llama", len(tokenizer)), tmp_path)
    write_gguf(model, tmp_path / "m.gguf", tokenizer, "f32")
    read = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in SENTENCES:
        assert read(text).input_ids == tokenizer(text).input_ids


def edited(tokenizer: PreTrainedTokenizerFast, **model: Any) -> PreTrainedTokenizerFast:
    known = json.loads(tokenizer.backend_tokenizer.to_str())
    known["model"] |= model
    core = tokenizers.Tokenizer.from_str(json.dumps(known))
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(("name", "whole"), [("gpt-2", False), ("llama-bpe", True), ("tekken", True), ("qwen2", False)])
def test_tokens_that_no_merge_makes(name: str, whole: bool) -> None:
    """llama.cpp takes a word that is a token as it is, for some ways of cutting and not for others; where merges make
    it all the same, there is no difference."""
    tokenizer = KNOWN_CUTS[name]()
    size = len(tokenizer)
    for ignores in (True, False):
        assert gguf_tokenizer(edited(tokenizer, ignore_merges=ignores), size).pre == name
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]
    for token, matters in (("zqxj", True), ("Ġzq!xj", False), ("zÃ", False)):  # no word, and no text
        for ignores in (True, False):
            odd = edited(tokenizer, ignore_merges=ignores, vocab={**vocabulary, token: size})
            if ignores == whole or not matters:
                assert gguf_tokenizer(odd, size + 1).tokens[size] == token
                continue
            does = "taken whole by the tokenizer" if ignores else "merged by the tokenizer"
            with pytest.raises(MergeError, match=f"the token 'zqxj' is {does} .* by llama.cpp's {name}"):
                gguf_tokenizer(odd, size + 1)


def test_tokenizers_without_a_mapping() -> None:
    word_level = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0})))
    with pytest.raises(MergeError, match="of the kind WordLevel, only for BPE"):
        gguf_tokenizer(word_level, 4)
    with pytest.raises(MergeError, match="that cuts text like this: .*Punctuation"):
        gguf_tokenizer(cut_by(pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(False)), 384)
    with pytest.raises(MergeError, match="that prepares text like this"):
        gguf_tokenizer(cut_by(pre_tokenizers.ByteLevel(True)), 384)
    with pytest.raises(MergeError, match="of id 383, and the model embeddings for 380"):
        gguf_tokenizer(make_tokenizer(), 380)
    with pytest.raises(MergeError, match=r"whose merges have end_of_word_suffix \('</w>'\)"):
        gguf_tokenizer(edited(make_tokenizer(), end_of_word_suffix="</w>"), 384)
    named_alike = make_tokenizer()
    named_alike.add_tokens(["[PAD390]"])
    with pytest.raises(MergeError, match=r"two tokens would have the text '\[PAD390\]'"):
        gguf_tokenizer(named_alike, 400)
