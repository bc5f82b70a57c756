"""Drawing completions from a model, and measuring how far one model has moved from another."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class TokenSamples:
    """Completions as token ids; B prompts, P the longest prompt, T the longest completion.

    prompt_ids:  int64 [B, P], padded on the left
    prompt_mask: int64 [B, P], 1 where there is a prompt token
    tokens:      int64 [B, T], padded on the right
    mask:        bool [B, T], True on sampled tokens, the end token included
    logps:       float32 [B, T], log-probability of each token when it was drawn, at temperature 1; 0 beyond the end
    ended:       bool [B], whether the end token was reached
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    tokens: Tensor
    mask: Tensor
    logps: Tensor
    ended: Tensor


@dataclass(frozen=True)
class Completion:
    """A sampled text; ``ended`` is False where it was cut at the length limit."""

    prompt: str
    text: str
    ended: bool


def _positions(mask: Tensor) -> Tensor:
    """Position of each token in its own row, whatever padding stands before it."""
    return (mask.cumsum(dim=1) - 1).clamp(min=0)


def _cache_argument(model: PreTrainedModel) -> str:
    """What its forward calls the cache: transformers 5.24 has renamed it, and warns of the older name."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _draw(weights: Tensor, generator: torch.Generator) -> Tensor:
    """One index a row, int64 [N, 1], with chances in proportion to weights [N, V].

    By the inverse of the cumulated weights: torch.multinomial draws a random number for every entry, which took a
    quarter of the sampling's time.
    """
    cumulated = weights.cumsum(dim=1)
    uniform = torch.rand(len(weights), 1, generator=generator, device=weights.device)
    # right=True passes over entries of weight 0, also at u = 0; a product may round up to the total itself.
    return torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True).clamp(max=weights.shape[1] - 1)


@torch.no_grad()
def sample_tokens(
    model: PreTrainedModel,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    *,
    end_id: int,
    pad_id: int,
    max_new_tokens: int,
    generator: torch.Generator,
    temperature: float = 1.0,
) -> TokenSamples:
    """Draw one completion for each row of ``prompt_ids`` (int64 [B, P], padded on the left).

    Rows that have ended are dropped from the batch once they are half of it, so that a few long texts do not
    cost as much as many.
    """
    rows = prompt_ids.shape[0]
    tokens = prompt_ids.new_full((rows, max_new_tokens), pad_id)
    logps = torch.zeros(rows, max_new_tokens, device=prompt_ids.device)
    ended = torch.zeros(rows, dtype=torch.bool, device=prompt_ids.device)
    lengths = prompt_ids.new_zeros(rows)

    cache, cache_name = DynamicCache(config=model.config), _cache_argument(model)
    live = torch.arange(rows, device=prompt_ids.device)  # which row each entry of the running batch is
    ids, mask = prompt_ids, prompt_mask
    positions = _positions(prompt_mask)
    for step in range(max_new_tokens):
        logits = model(
            ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{cache_name: cache},
        ).logits[:, -1]
        log_probs = logits.float().log_softmax(dim=-1)
        weights = log_probs.exp() if temperature == 1.0 else (log_probs / temperature).softmax(dim=-1)
        drawn = _draw(weights, generator)
        running = ~ended[live]
        here = live[running]
        tokens[here, step] = drawn[running, 0]
        logps[here, step] = log_probs.gather(1, drawn)[running, 0]
        lengths[here] = step + 1
        ended[here] = drawn[running, 0] == end_id

        running = ~ended[live]
        if not running.any():
            break
        positions = positions[:, -1:] + 1
        ids = drawn
        mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
        if 2 * running.sum() <= len(live):
            kept = running.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            live, ids, mask, positions = live[kept], ids[kept], mask[kept], positions[kept]

    longest = int(lengths.max())
    return TokenSamples(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        tokens=tokens[:, :longest],
        mask=torch.arange(longest, device=lengths.device) < lengths[:, None],
        logps=logps[:, :longest],
        ended=ended,
    )


def sample_batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    batch_size: int = 256,
    on_batch: Callable[[int], None] = lambda count: None,
) -> list[TokenSamples]:
    """Draw one completion for each prompt, ``batch_size`` at a time. ``on_batch`` is told how many were drawn."""
    batches = []
    for start in range(0, len(prompts), batch_size):
        encoded = tokenizer(
            list(prompts[start : start + batch_size]), padding=True, padding_side="left", return_tensors="pt"
        ).to(model.device)
        batches.append(
            sample_tokens(
                model,
                encoded["input_ids"],
                encoded["attention_mask"],
                end_id=tokenizer.eos_token_id,
                pad_id=tokenizer.pad_token_id,
                max_new_tokens=max_new_tokens,
                generator=generator,
                temperature=temperature,
            )
        )
        on_batch(len(encoded["input_ids"]))
    return batches


def decode(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], batches: Sequence[TokenSamples]
) -> list[Completion]:
    """The texts of ``sample_batches``, without their end token."""
    texts = [text for batch in batches for text in tokenizer.batch_decode(batch.tokens, skip_special_tokens=True)]
    ended = [bool(flag) for batch in batches for flag in batch.ended]
    return [Completion(*row) for row in zip(prompts, texts, ended, strict=True)]


def completion_log_probs(model: PreTrainedModel, samples: TokenSamples) -> Tensor:
    """Log-probabilities of every vocabulary entry at each completion position, float32 [B, T, V]."""
    ids = torch.cat([samples.prompt_ids, samples.tokens], dim=1)
    # Positions beyond the end are never attended to by what comes before them; only the prompt's padding is hidden.
    mask = torch.cat([samples.prompt_mask, torch.ones_like(samples.tokens)], dim=1)
    steps = samples.tokens.shape[1]
    logits: Tensor = model(
        ids[:, :-1],
        attention_mask=mask[:, :-1],
        position_ids=_positions(mask)[:, :-1],
        use_cache=False,
        logits_to_keep=steps,
    ).logits
    return logits.float().log_softmax(dim=-1)


@torch.no_grad()
def sequence_kl(policy: PreTrainedModel, reference: PreTrainedModel, samples: TokenSamples) -> Tensor:
    """KL(policy || reference) of whole completions, in nats, estimated on samples of the policy: float32 [B].

    At each position the divergence of the two next-token distributions is summed over the vocabulary exactly, instead
    of being taken at the drawn token alone: the same expectation with less variance, and never negative.
    The mean over samples that the policy drew at temperature 1 estimates the divergence without bias.
    """
    ours = completion_log_probs(policy, samples)
    theirs = completion_log_probs(reference, samples)
    per_token = (ours.exp() * (ours - theirs)).sum(dim=-1)
    return (per_token * samples.mask).sum(dim=1)
