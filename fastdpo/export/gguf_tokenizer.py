"""A tokenizer as GGUF has it: tokens, what kind each is, merges or scores, and how text is cut before."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerBase

from fastdpo.export.live import MergeError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
)
# How byte-level tokenizers cut text before they merge -> llama.cpp's name for it.
_CUTS = {
    _WORDS + r"|\p{N}{1,3}" + _REST: "llama-bpe",
    _WORDS + r"|\p{N}" + _REST: "qwen2",
    _CASED + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+": "tekken",
}
# Ways of cutting whose pieces llama.cpp takes as they are, without merging, where they are tokens.
_WHOLE = ("llama-bpe", "tekken")
# What the merges of a BPE may have besides, and those of llama.cpp have not.
_OTHER_MERGES = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")


@dataclass(frozen=True)
class GGUFTokenizer:
    """What of a tokenizer is written.

    Attributes:
        model: ``gpt2`` (bytes, with merges) or ``llama`` (SentencePiece, with scores).
        pre: how text is cut before.
        tokens, types: as many as the model has embeddings.
        merges: of ``gpt2``, best first.
        scores: of ``llama``.
        ids: of bos, eos, unk and pad.
        flags: what is added before and after a text.
        chat_template: None for none.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    ids: Mapping[str, int] = field(default_factory=dict)
    flags: Mapping[str, bool] = field(default_factory=dict)
    chat_template: str | None = None


def gguf_tokenizer(tokenizer: PreTrainedTokenizerBase, rows: int) -> GGUFTokenizer:
    """
    Args:
        tokenizer: of the model.
        rows: how many embeddings the model has.

    Raises:
        MergeError: it is of a kind for which there is no mapping, or has more tokens than the model.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise MergeError(f"{type(tokenizer).__name__} is no tokenizer of the package tokenizers; --gguf needs one")
    known = json.loads(backend.to_str())
    model = known["model"]
    if model["type"] != "BPE":
        raise MergeError(f"--gguf has no mapping for tokenizers of the kind {model['type']}, only for BPE")
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if (highest := max(vocabulary.values())) >= rows:
        raise MergeError(
            f"the tokenizer has the token {backend.id_to_token(highest)!r} of id {highest}, and the model embeddings "
            f"for {rows}; give the model embeddings for it (resize_token_embeddings) and save it"
        )
    for name in _OTHER_MERGES:
        if model.get(name):
            raise MergeError(f"--gguf has no mapping for a tokenizer whose merges have {name} ({model[name]!r})")
    is_bytes = not model.get("byte_fallback")
    pre = _cut_name(known) if is_bytes else "default"
    if bool(model.get("ignore_merges")) != (pre in _WHOLE):
        _refuse_unlike_wholes(known, pre, is_bytes)
    tokens, types = [f"[PAD{i}]" for i in range(rows)], [_UNUSED] * rows
    added = {entry["id"]: entry for entry in known["added_tokens"]}
    for token, i in vocabulary.items():
        tokens[i], types[i] = token, _type_of(token, added.get(i), model.get("unk_token"), is_bytes)
        if not is_bytes and types[i] == _USER_DEFINED:
            tokens[i] = token.replace("\u2581", " ")
    if twice := [token for token, count in Counter(tokens).items() if count > 1]:
        raise MergeError(f"--gguf: two tokens would have the text {twice[0]!r}, which llama.cpp refuses")
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in model["merges"]]
    return GGUFTokenizer(
        model="gpt2" if is_bytes else "llama",
        pre=pre,
        tokens=tokens,
        types=types,
        merges=[" ".join(merge) for merge in merges] if is_bytes else [],
        scores=[] if is_bytes else _scores(tokens, merges),
        ids={
            name: i
            for name in ("bos", "eos", "unk", "pad")
            if (i := getattr(tokenizer, f"{name}_token_id")) is not None
        },
        flags=_flags(tokenizer, is_bytes),
        chat_template=_template(tokenizer),
    )


def _type_of(token: str, added: dict[str, Any] | None, unknown: str | None, is_bytes: bool) -> int:
    if not is_bytes and token == unknown:
        return _UNKNOWN
    if added is not None:
        return _CONTROL if added["special"] else _USER_DEFINED
    is_byte = not is_bytes and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return _BYTE if is_byte else _NORMAL


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """The better a merge, the higher the score of what it makes; what none makes is not merged."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _cut_name(known: dict[str, Any]) -> str:
    """llama.cpp's name for the way in which a byte-level tokenizer cuts text before it merges."""
    cut = known.get("pre_tokenizer") or {}
    steps = cut.get("pretokenizers", [cut])
    kinds = [step.get("type") for step in steps]
    *before, last = steps
    if (
        known.get("normalizer") not in (None, {"type": "NFC"})
        or kinds[-1:] != ["ByteLevel"]
        or last["add_prefix_space"]
    ):
        raise MergeError(f"--gguf has no mapping for a tokenizer that prepares text like this: {json.dumps(cut)[:300]}")
    if not before and last["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and before[0]["individual_digits"] and last["use_regex"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not last["use_regex"] and before[0]["behavior"] == "Isolated":
        name = _CUTS.get(before[0]["pattern"].get("Regex", ""))
        if name is not None:
            return name
    raise MergeError(f"--gguf has no mapping for a tokenizer that cuts text like this: {json.dumps(cut)[:300]}")


def _refuse_unlike_wholes(known: dict[str, Any], pre: str, is_bytes: bool) -> None:
    """Raises where it matters whether a piece of text that is a token is taken whole (``ignore_merges``): where merges
    make something else of one."""
    merging = Tokenizer.from_str(json.dumps(known | {"model": known["model"] | {"ignore_merges": False}}))
    added = {entry["content"] for entry in known["added_tokens"]}  # which are cut out beforehand
    for token, i in known["model"]["vocab"].items():
        if token in added or [made.id for made in merging.model.tokenize(token)] == [i]:
            continue
        if _is_a_piece(token, merging, is_bytes):
            does, other = "merged", "taken whole"
            if known["model"].get("ignore_merges"):
                does, other = other, does
            raise MergeError(
                f"--gguf: the token {token!r} is {does} by the tokenizer (ignore_merges), and {other} by llama.cpp's "
                f"{pre}, which comes to other tokens"
            )


def _is_a_piece(token: str, tokenizer: Tokenizer, is_bytes: bool) -> bool:
    """Whether text is cut into pieces that may be ``token``."""
    cut = tokenizer.pre_tokenizer
    if cut is None:
        return True
    text = ByteLevel().decode([token]) if is_bytes else token
    return [piece for piece, _ in cut.pre_tokenize_str(text)] == [token]


def _flags(tokenizer: PreTrainedTokenizerBase, is_bytes: bool) -> dict[str, bool]:
    ids: Any = tokenizer("a")["input_ids"]
    found = {
        "add_bos_token": tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id],
        "add_eos_token": tokenizer.eos_token_id is not None and ids[-1:] == [tokenizer.eos_token_id],
    }
    if not is_bytes:
        found["add_space_prefix"] = tokenizer.tokenize("a")[0].startswith("\u2581")
    return found


def _template(tokenizer: PreTrainedTokenizerBase) -> str | None:
    template: Any = tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template
