"""Texts are parted before words where a tokenizer splits them there, and nowhere else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors
from toy_data import SENTENCES, make_tokenizer
from transformers import PreTrainedTokenizerFast

from fastdpo.data.encode import Encoder
from fastdpo.data.word_cuts import last_word, parts_at_words

TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CL100K = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + TAIL
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}"
) + TAIL.replace("[\\r\\n]*", "[\\r\\n/]*")


def split(expression: str, behavior: str = "isolated") -> Any:
    return pre_tokenizers.Split(Regex(expression), behavior)


PLAIN = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
SPLITTERS = {
    "GPT-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "GPT-2, spelled out": pre_tokenizers.Sequence([split(GPT2), PLAIN]),
    "digits alone": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "Llama 3": pre_tokenizers.Sequence([split(CL100K), PLAIN]),
    "Qwen 2": pre_tokenizers.Sequence([split(CL100K.replace("{1,3}", "")), PLAIN]),
    "gpt-oss": pre_tokenizers.Sequence([split(O200K), PLAIN]),
    "two expressions": pre_tokenizers.Sequence([split(r"\p{N}{1,3}"), split(CL100K), PLAIN]),
}
OTHERS = {
    "a space in front": pre_tokenizers.ByteLevel(add_prefix_space=True),
    "no splitting": PLAIN,
    "pairs of words": pre_tokenizers.Sequence([split(r"\p{L}+ \p{L}+|\s+"), PLAIN]),
    "comments are one piece": pre_tokenizers.Sequence([split(r"#[^\n]+|" + CL100K), PLAIN]),
    "digits in threes from the right": pre_tokenizers.Sequence(
        [split(r"\d{1,3}(?=(?:\d{3})*\b)"), split(CL100K), PLAIN]
    ),
    "what is looked for is left out": pre_tokenizers.Sequence([split(CL100K, "removed"), PLAIN]),
    "words alone": pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), PLAIN]),
    "Metaspace": pre_tokenizers.Metaspace(),
}


def tokenizer_of(splitter: Any, normalizer: Any = None, bos: bool = False) -> PreTrainedTokenizerFast:
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = splitter
    core.decoder = tokenizers.decoders.ByteLevel()
    if normalizer is not None:
        core.normalizer = normalizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<s>", "</s>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES * 4, trainer)
    if bos:
        start = ("<s>", core.token_to_id("<s>"))
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[start])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {name: tokenizer_of(splitter) for name, splitter in SPLITTERS.items()} | {
    "composed": tokenizer_of(SPLITTERS["Qwen 2"], normalizers.NFC()),
    "composed, in a sequence": tokenizer_of(SPLITTERS["Qwen 2"], normalizers.Sequence([normalizers.NFC()])),
    "BOS in front": tokenizer_of(SPLITTERS["Llama 3"], bos=True),
}

words = st.sampled_from([*" ".join(SENTENCES).split(), "don't", "I'LL", "e\u0301", "\u0301a", "x1y", "123456", "</s>"])
between = st.sampled_from([" ", " ", " ", "  ", "\n", " \n ", "", "'", "\t", "\u00a0", "#", "<|im_end|>", "é", "🙂"])
texts = st.lists(st.tuples(words, between), max_size=8).map(lambda some: "".join(w + b for w, b in some))


@pytest.mark.parametrize("name", TOKENIZERS)
@given(groups=st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=6), special=st.booleans())
def test_ids_are_those_of_the_whole_text(name: str, groups: list[tuple[str, str, str]], special: bool) -> None:
    tokenizer = TOKENIZERS[name]
    encoder = Encoder(tokenizer)
    assert encoder._at_words
    encoder._untried = 0  # the trial would hide a fault
    whole = [(prompt, prompt + chosen, prompt + rejected) for prompt, chosen, rejected in groups]
    expected = [tokenizer(list(group), add_special_tokens=special)["input_ids"] for group in whole]
    assert encoder.encode_groups(whole, add_special_tokens=special) == expected


@pytest.mark.parametrize("name", OTHERS)
def test_tokenizers_of_which_it_is_not_known_are_left(name: str) -> None:
    assert not Encoder(tokenizer_of(OTHERS[name]))._at_words


def test_tokens_that_reach_over_a_space_and_other_models_are_left() -> None:
    assert Encoder(make_tokenizer())._at_words
    for token in (AddedToken("two words"), AddedToken("end", rstrip=True), AddedToken("<x>", lstrip=True)):
        tokenizer = make_tokenizer()
        tokenizer.add_tokens([token])
        assert not Encoder(tokenizer)._at_words
    for change in (
        lambda core: setattr(core.model, "dropout", 0.1),
        lambda core: setattr(core, "normalizer", normalizers.Replace(" ", "_")),
        lambda core: setattr(core, "normalizer", normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])),
        lambda core: setattr(core, "pre_tokenizer", None),
        lambda core: setattr(core, "model", models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")),
    ):
        core = copy.deepcopy(make_tokenizer().backend_tokenizer)
        change(core)
        assert not parts_at_words(make_tokenizer(), core)


def test_a_tokenizer_that_puts_a_token_behind_parts_no_text() -> None:
    tokenizer = tokenizer_of(SPLITTERS["GPT-2"])
    ends = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ends
    )
    group = [SENTENCES[0], f"{SENTENCES[0]} And so on."]
    assert Encoder(tokenizer).encode_groups([group], add_special_tokens=True) == [tokenizer(group)["input_ids"]]


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a b", 1),
        ("the end of it ", 10),
        (" a", 0),
        ("a ", 0),
        ("", 0),
        ("a  b", 0),
        ("a b  c", 1),
        ("é b", 0),
        ("a 1", 0),
    ],
)
def test_where_the_last_word_begins(text: str, place: int) -> None:
    assert last_word(text) == place
