"""Completions of a model: loading it, adapter or not, rendering prompts, and drawing texts."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fastdpo.model.adapters import base_of_adapter, load_tokenizer, put_on
from fastdpo.model.auto_class import auto_class_of
from fastdpo.model.language_model import embedding_rows, language_model

Prompt = str | list[dict[str, Any]]


@dataclass(frozen=True)
class Drawing:
    """How completions are drawn.

    Attributes:
        max_new_tokens: where a completion is cut.
        temperature: 0 takes the likeliest token each time; else tokens are drawn from the model's probabilities, all of
            the vocabulary, with the logits divided by this.
        seed: of the draws; the caller's random state is left as it was.
        batch_size: prompts at a time.
        max_seconds: after which a batch's completions are cut where they are (at least a token long); None for no such
            limit.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    batch_size: int = 8
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("temperature", 0), ("batch_size", 1), ("max_seconds", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} is {value}; it should be at least {least}")


@dataclass(frozen=True)
class Text:
    """A completion of so many tokens; ``ended`` is False where it was cut at a limit."""

    text: str
    ended: bool
    tokens: int


@dataclass(frozen=True)
class LoadedModel:
    """A model that can generate.

    Attributes:
        name: as it was asked for.
        model: the model, or the PEFT model around its base.
        tokenizer: its own, or its base's.
        base_name: of the model under an adapter; None for a model of its own.
    """

    name: str
    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    base_name: str | None


def load_for_generation(
    name: str, *, dtype: str = "auto", device: str | None = None, trust_remote_code: bool = False
) -> LoadedModel:
    """Load a causal language model, or an adapter on top of the model that it names.

    Args:
        name: a Hub id, or a folder.
        dtype: of the weights, as ``from_pretrained`` takes it.
        device: by default an accelerator where there is one.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        ValueError, OSError: there is no such model, or it cannot be read.
    """
    base = base_of_adapter(name)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    auto_class = auto_class_of(base or name, images=False, **options)
    model: Any = auto_class.from_pretrained(base or name, dtype=dtype, **options)
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    if base is not None:
        model = put_on(model, name)
    if device is None:
        device = str(torch.accelerator.current_accelerator() or "cpu")
    return LoadedModel(name, model.to(device).eval(), tokenizer, base)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, as_chat: bool) -> list[int]:
    """The ids after which a completion begins, as in training.

    Args:
        tokenizer: of the model.
        prompt: a text or a message list.
        as_chat: a text becomes a user's message; message lists always go through the chat template.

    Raises:
        ValueError: the chat template is needed and not there, or refuses the messages; or the prompt has no token.
    """
    if isinstance(prompt, str) and as_chat:
        prompt = [{"role": "user", "content": prompt}]
    ids: Any  # both ways to tokenise give what was asked for
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif tokenizer.chat_template is None:
        raise ValueError("the prompt is a list of messages, but the tokenizer has no chat template to render it with")
    else:
        try:
            rendered: Any = tokenizer.apply_chat_template(
                prompt, tokenize=True, add_generation_prompt=True, return_dict=True
            )
        except Exception as error:  # templates raise whatever their authors chose
            raise ValueError(f"the chat template refused the messages: {error}") from error
        ids = rendered["input_ids"]
    if not ids:
        raise ValueError("the prompt is empty, and the tokenizer puts no token before it")
    return list(ids)


@torch.no_grad()
def complete(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    drawing: Drawing,
) -> list[Text]:
    """One completion for each of ``prompts`` (token ids, none of them empty).

    Raises:
        NotImplementedError: the model cannot generate.
        ValueError: prompt and completion together would be longer than the model's positions reach, or a prompt has a
            token that the model has no embedding for.
    """
    if not model.can_generate():
        raise NotImplementedError(f"{type(model).__name__} cannot generate texts")
    longest = max(map(len, prompts), default=0) + drawing.max_new_tokens
    limit = getattr(language_model(model).config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ValueError(
            f"a prompt and {drawing.max_new_tokens} new tokens are {longest} tokens, and the model's positions reach "
            f"to {limit}; shorten the prompt or max_new_tokens"
        )
    rows = embedding_rows(model)
    highest = max((max(prompt) for prompt in prompts), default=0)
    if highest >= rows:
        raise ValueError(
            f"a prompt has the token {tokenizer.convert_ids_to_tokens(highest)!r}, whose id is {highest}, and the "
            f"model has embeddings for {rows} (0 to {rows - 1}): the tokenizer is another model's, or was added to"
        )
    ends = end_ids(model, tokenizer)
    pad = tokenizer.pad_token_id
    if pad is None or pad >= rows:  # attention_mask hides it, whichever it is
        pad = next(iter(ends), 0)
    config = _generation_config(drawing, ends, pad)
    generate = cast(Callable[..., Tensor], model.generate)
    texts: list[Text] = []
    with _seeded(drawing.seed, model.device):
        for start in range(0, len(prompts), drawing.batch_size):
            ids, mask = _pad_left(prompts[start : start + drawing.batch_size], pad)
            inputs = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
            drawn = generate(**inputs, generation_config=config)[:, ids.shape[1] :]
            texts += [_decode(tokenizer, row, ends) for row in drawn.tolist()]
    return texts


def _generation_config(drawing: Drawing, ends: set[int], pad: int) -> GenerationConfig:
    # What a model's generation_config.json proposes (penalties, top-k) is left aside, by naming the neutral values:
    # the completions that are compared are the models' own.
    neutral = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "min_length": 0}
    if drawing.temperature:
        neutral |= {"temperature": drawing.temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0}
    return GenerationConfig(
        do_sample=drawing.temperature > 0,
        max_new_tokens=drawing.max_new_tokens,
        max_time=drawing.max_seconds,
        eos_token_id=sorted(ends) or None,
        pad_token_id=pad,
        use_cache=True,
        **neutral,
    )


def end_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """What ends a completion: the tokenizer's end token, and those that the model's own configuration names."""
    return configured_ends(model) | ({tokenizer.eos_token_id} - {None})


def configured_ends(model: PreTrainedModel | PeftModel) -> set[int]:
    """What the model's own generation configuration ends a completion at; empty where it has none."""
    named = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return {token for token in (named if isinstance(named, list) else [named]) if token is not None}


def _pad_left(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def _decode(tokenizer: PreTrainedTokenizerBase, tokens: list[int], ends: set[int]) -> Text:
    length = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    text = cast(str, tokenizer.decode(tokens[:length], skip_special_tokens=True))  # of one row
    return Text(text, length < len(tokens), length)


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
