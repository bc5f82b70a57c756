"""fastdpo.model.generation: greedy completions against a loop of forwards, and what loads, renders and is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_models import make_model
from toy_data import assistant, make_tokenizer, user
from transformers import GenerationConfig, PreTrainedModel

from fastdpo.model.adapters import base_of_adapter
from fastdpo.model.generation import Drawing, Text, complete, encode_prompt, load_for_generation

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = make_tokenizer()
MODEL = make_model("llama")


def greedy(model: PreTrainedModel, prompt: list[int], count: int) -> Text:
    """One prompt, no cache, no padding."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == TOKENIZER.eos_token_id:
            break
        ids.append(token)
    new = ids[len(prompt) :]
    return Text(TOKENIZER.decode(new, skip_special_tokens=True), ended=len(new) < count, tokens=len(new))


@given(
    prompts=st.lists(st.lists(st.integers(3, 383), min_size=1, max_size=9), min_size=1, max_size=5),
    batch_size=st.integers(1, 5),
)
@settings(max_examples=15)
def test_greedy_is_the_likeliest_token_each_time(prompts: list[list[int]], batch_size: int) -> None:
    model = make_model("llama", dtype=torch.float64)
    texts = complete(model, TOKENIZER, prompts, Drawing(6, batch_size=batch_size))
    assert texts == [greedy(model, prompt, 6) for prompt in prompts]


@pytest.mark.parametrize("kind", ["gpt2", "mamba", "gemma2"])
def test_other_families(kind: str) -> None:
    model = make_model(kind, dtype=torch.float64)
    assert complete(model, TOKENIZER, [[5, 9, 7]], Drawing(5)) == [greedy(model, [5, 9, 7], 5)]


def test_what_ends_a_text_is_not_part_of_it() -> None:
    model, prompt = make_model("llama", dtype=torch.float64), [5, 9, 7]
    config = GenerationConfig(do_sample=False, max_new_tokens=4, pad_token_id=0, eos_token_id=None)
    tokens = model.generate(torch.tensor([prompt]), generation_config=config)[0, 3:].tolist()
    end = next(i for i, token in enumerate(tokens) if token not in tokens[:i] and i > 0)
    model.generation_config.eos_token_id = [tokens[end], 383]
    expected = TOKENIZER.decode(tokens[:end], skip_special_tokens=True)
    assert complete(model, TOKENIZER, [prompt], Drawing(4)) == [Text(expected, ended=True, tokens=end)]
    assert complete(model, TOKENIZER, [prompt], Drawing(end)) == [Text(expected, ended=False, tokens=end)]


def test_draws_repeat_with_the_seed_and_leave_the_random_state_alone() -> None:
    prompts = [[5, 6, 7]] * 4
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = complete(MODEL, TOKENIZER, prompts, Drawing(12, temperature=1.0, seed=3))
    assert torch.equal(torch.rand(3), expected)
    assert complete(MODEL, TOKENIZER, prompts, Drawing(12, temperature=1.0, seed=3)) == first
    assert complete(MODEL, TOKENIZER, prompts, Drawing(12, temperature=1.0, seed=4)) != first
    assert len({text.text for text in first}) > 1


def test_a_models_own_proposals_are_left_aside() -> None:
    model = make_model("llama", dtype=torch.float64)
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.no_repeat_ngram_size = 1
    assert complete(model, TOKENIZER, [[5, 9]], Drawing(10)) == [greedy(model, [5, 9], 10)]


def test_chats_and_texts_are_rendered_as_in_training() -> None:
    chat = [user("Good day.")]
    rendered = TOKENIZER.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert encode_prompt(TOKENIZER, chat, as_chat=False) == rendered
    assert encode_prompt(TOKENIZER, "Good day.", as_chat=True) == rendered
    assert encode_prompt(TOKENIZER, "Good day.", as_chat=False) == TOKENIZER("Good day.")["input_ids"]


def test_what_cannot_be_completed_is_said() -> None:
    bare = make_tokenizer()
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompt(bare, [user("x")], as_chat=False)
    bare.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="refused the messages: roles must alternate"):
        encode_prompt(bare, [assistant("x")], as_chat=False)
    with pytest.raises(ValueError, match="the prompt is empty"):
        encode_prompt(TOKENIZER, "", as_chat=False)
    with pytest.raises(ValueError, match="260 tokens, and the model's positions reach to 256"):
        complete(MODEL, TOKENIZER, [[5] * 250], Drawing(10))
    for bad in ({"max_new_tokens": 0}, {"temperature": -1.0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} is .*; it should be at least"):
            Drawing(**bad)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and an adapter on it that changes what it says."""
    root = tmp_path_factory.mktemp("models")
    MODEL.save_pretrained(root / "base")
    TOKENIZER.save_pretrained(root / "base")
    base = make_model("llama")
    base.config._name_or_path = base.name_or_path = str(root / "base")
    torch.manual_seed(1)
    adapter = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapter.peft_config["default"].base_model_name_or_path = str(root / "base")
    adapter.save_pretrained(root / "adapter")
    return root / "base", root / "adapter"


def test_adapters_are_loaded_on_top_of_their_base(folders: tuple[Path, Path]) -> None:
    base, adapter = map(str, folders)
    assert base_of_adapter(base) is None
    assert base_of_adapter(adapter) == base
    loaded = load_for_generation(adapter, device="cpu")
    assert loaded.base_name == base
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), loaded.model.disable_adapter():
        assert torch.equal(loaded.model(ids).logits, MODEL(ids).logits)
    with torch.no_grad():
        assert not torch.allclose(loaded.model(ids).logits, MODEL(ids).logits)
    assert complete(loaded.model, loaded.tokenizer, [[5, 6]], Drawing(3))  # the base's tokenizer: it has none itself
