"""A byte-level BPE tokenizer and a small Llama, both trained from nothing on the demo's corpus."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastdpo.demo.corpus import Review

END = "<|end|>"
PADDING = "<|pad|>"
IGNORED = -100


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE of at most ``vocab_size`` entries; it adds no special token by itself."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PADDING, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PADDING,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, *, hidden_size: int, layers: int, seed: int, max_positions: int = 256
) -> LlamaForCausalLM:
    """A freshly initialised Llama with heads of 64 and tied embeddings, in float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        max_position_embeddings=max_positions,
        # Far above the usual 0.02: a short training cannot spend its steps on growing the weights.
        initializer_range=hidden_size**-0.5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def encode_completions(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], texts: Sequence[str]
) -> list[tuple[list[int], list[int]]]:
    """Token ids of each (prompt, completion), the completion closed by the end token."""
    prompt_ids = tokenizer(list(prompts))["input_ids"]
    text_ids = tokenizer(list(texts))["input_ids"]
    return [(prompt, [*text, tokenizer.eos_token_id]) for prompt, text in zip(prompt_ids, text_ids, strict=True)]


def _right_padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of ids as one int64 [rows, longest]."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def pretrain(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    reviews: Sequence[Review],
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    rng: random.Random,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train on whole reviews, prompt included; returns the mean token loss, in nats, of each step.

    ``on_step`` is told the number of steps done and the last loss.
    """
    rows = [
        prompt + text
        for prompt, text in encode_completions(tokenizer, [r.prompt for r in reviews], [r.text for r in reviews])
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=learning_rate, total_steps=steps, pct_start=0.1, div_factor=10, final_div_factor=10
    )
    model.train()
    losses: list[float] = []
    batches: list[list[list[int]]] = []
    for step in range(1, steps + 1):
        if not batches:
            batches = _batches_of_similar_length(rows, batch_size, rng)
        batch = batches.pop()
        ids = _right_padded(batch, tokenizer.pad_token_id)
        targets = _right_padded(batch, IGNORED)[:, 1:]
        # Padding is on the right and attention is causal: no mask is needed.
        logits = model(ids[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        on_step(step, losses[-1])
    model.eval()
    return losses


def _batches_of_similar_length(rows: Sequence[list[int]], size: int, rng: random.Random) -> list[list[list[int]]]:
    """One pass over the rows in random order, each batch of rows of about equal length, so that padding is rare."""
    shuffled = rng.sample(rows, len(rows))
    pool = 16 * size
    batches = []
    for start in range(0, len(shuffled), pool):
        chunk = sorted(shuffled[start : start + pool], key=len)
        batches += [chunk[place : place + size] for place in range(0, len(chunk), size)]
    rng.shuffle(batches)
    return batches


@torch.no_grad()
def perplexity(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    texts: Sequence[str],
    batch_size: int = 128,
) -> float:
    """exp of the mean loss per completion token (end token included), given the prompts."""
    total, count = 0.0, 0
    pairs = sorted(encode_completions(tokenizer, prompts, texts), key=lambda pair: len(pair[0]) + len(pair[1]))
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        ids = _right_padded([prompt + text for prompt, text in batch], tokenizer.pad_token_id)
        targets = _right_padded([[IGNORED] * len(prompt) + text for prompt, text in batch], IGNORED)[:, 1:]
        logits = model(ids[:, :-1], use_cache=False).logits
        total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum").item()
        count += int((targets != IGNORED).sum())
    return float(torch.tensor(total / count).exp())
