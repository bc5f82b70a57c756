"""Ids of texts that are taken apart are those of the whole, for tokenizers of every kind."""

from __future__ import annotations

import pytest
import tokenizers
from families import family_template, tokenizer_with
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers
from toy_data import SENTENCES, make_tokenizer
from transformers import PreTrainedTokenizerFast

from fastdpo.data.encode import Encoder, decode

MARKS = ["<|im_start|>", "<|im_end|>", "</s>"]


def metaspace(scheme: str) -> PreTrainedTokenizerFast:
    """As SentencePiece has it: a space becomes a letter, and may be put in front."""
    core = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.NFKC()])
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    spaces = decoders.Metaspace(prepend_scheme=scheme)
    core.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse()])
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", *MARKS], show_progress=False)
    core.train_from_iterator(SENTENCES * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>")


def stripping() -> PreTrainedTokenizerFast:
    """Its tokens take in the space around them."""
    tokenizer = make_tokenizer()
    tokens = [tokenizers.AddedToken(mark, lstrip=True, rstrip=True, special=True) for mark in MARKS[:2]]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    return tokenizer


def overlapping() -> PreTrainedTokenizerFast:
    """One of its tokens ends as another begins."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["x<|im", *MARKS[:2], "<|im_start|>x"]})
    return tokenizer


TOKENIZERS = {
    "byte level": tokenizer_with(family_template("chatml")),
    "spaces first": metaspace("first"),
    "spaces always": metaspace("always"),
    "spaces never": metaspace("never"),
    "stripping": stripping(),
    "overlapping": overlapping(),
}
PIECES = [*MARKS, *SENTENCES, " ", "\n", "x", "x<|im", "_start|>", "é", "user\n", "  a"]
pieces = st.lists(st.sampled_from(PIECES), max_size=8)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(groups=st.lists(st.tuples(pieces, st.lists(pieces, min_size=1, max_size=2)), min_size=1, max_size=20))
def test_ids_are_those_of_the_whole_text(kind: str, groups: list[tuple[list[str], list[list[str]]]]) -> None:
    tokenizer = TOKENIZERS[kind]
    texts = [["".join(head), *("".join(head + tail) for tail in tails)] for head, tails in groups]
    encoder = Encoder(tokenizer)
    encoder._untried = 0  # the trial would hide a fault
    expected = [tokenizer(group, add_special_tokens=False)["input_ids"] for group in texts]
    assert encoder.encode_groups(texts) == expected
    ids = [sequence for group in expected for sequence in group]
    assert encoder.decode(ids) == [decode(tokenizer, sequence) for sequence in ids]


def test_a_tokenizer_that_looks_across_is_found_out() -> None:
    encoder = Encoder(TOKENIZERS["byte level"])
    encoder._parting, encoder._at_words = ["e"], False  # where no text may be parted
    groups = [["The sky over the harbour", "The sky over the harbour turned"]] * 3
    expected = [[*TOKENIZERS["byte level"](group)["input_ids"]] for group in groups]
    assert encoder.encode_groups(groups) == expected
    assert encoder._parting == []


def test_which_tokens_part_a_text() -> None:
    assert "<|im_start|>" in Encoder(TOKENIZERS["byte level"])._parting
    assert all("<|im_start|>" not in Encoder(TOKENIZERS[kind])._parting for kind in ("stripping", "overlapping"))


def test_a_tokenizer_with_truncation_of_its_own_cuts_nothing() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    text = SENTENCES[0]
    assert Encoder(tokenizer).encode([text], add_special_tokens=False) == [make_tokenizer()(text)["input_ids"]]


def test_a_class_that_encodes_in_python_does() -> None:
    class Own(PreTrainedTokenizerFast):
        def _encode_plus(self, text, **kwargs):  # noqa: ANN001, ANN003, ANN202
            shout = [t.upper() for t in text] if isinstance(text, list) else text.upper()
            return super()._encode_plus(shout, **kwargs)

    own = Own(tokenizer_object=make_tokenizer().backend_tokenizer, eos_token="</s>")
    assert Encoder(own).encode(["abc"], add_special_tokens=False) == [make_tokenizer()("ABC")["input_ids"]]
