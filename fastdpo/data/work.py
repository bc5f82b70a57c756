"""How many tokens a step costs: in padded rows, two a pair, and packed, with each prompt once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# In random batches, for a mean of their widths; few pairs need not be drawn that often.
_ENOUGH_PAIRS, _ENOUGH_ORDERS = 4096, 32


@dataclass
class Work:
    """Mean tokens of a step.

    Attributes:
        batch_size: pairs a step.
        padded: tokens of two padded rows a pair, prompt in both; as many through the body as through the head, which
            makes logits everywhere.
        packed_body: tokens through the body with each prompt once and no padding.
        packed_head: tokens of completions, which alone need the head.
        prompt_share: the prompts' part of ``packed_body``.
    """

    batch_size: int
    padded: float
    packed_body: float
    packed_head: float
    prompt_share: float


def estimate_work(
    prompt: np.ndarray,
    chosen: np.ndarray,
    rejected: np.ndarray,
    *,
    max_length: int | None,
    truncation_mode: str,
    batch_size: int,
) -> Work:
    """From the lengths of rows before any cut, [rows] each, for batches drawn at random."""
    sides = [_cut_lengths(prompt, side, max_length, truncation_mode) for side in (chosen, rejected)]
    prompts, completions = zip(*sides, strict=True)
    # With keep_end the two sides may keep different parts of the prompt, which cannot be shared.
    shared = np.where(prompts[0] == prompts[1], prompts[0], prompts[0] + prompts[1])
    body = shared + completions[0] + completions[1]
    # Without a prompt the first token has no predecessor, and is not predicted.
    head = completions[0] + completions[1] - (prompts[0] == 0) - (prompts[1] == 0)
    width = np.maximum(prompts[0] + completions[0], prompts[1] + completions[1])
    size = min(batch_size, len(width))
    random, whole = np.random.default_rng(0), len(width) // size * size
    orders = min(_ENOUGH_ORDERS, -(-_ENOUGH_PAIRS // whole))
    widest = [random.permutation(width)[:whole].reshape(-1, size).max(1) for _ in range(orders)]
    return Work(
        batch_size=size,
        padded=2 * size * float(np.concatenate(widest).mean()),
        packed_body=size * float(body.mean()),
        packed_head=size * float(head.mean()),
        prompt_share=float(shared.sum() / body.sum()),
    )


def _cut_lengths(
    prompt: np.ndarray, completion: np.ndarray, max_length: int | None, truncation_mode: str
) -> tuple[np.ndarray, np.ndarray]:
    """What ``fastdpo.data.truncation.cut`` leaves of each."""
    if max_length is None:
        return prompt, completion
    if truncation_mode == "keep_start":
        kept = np.minimum(prompt, max_length)
        return kept, np.minimum(completion, max_length - kept)
    kept = np.minimum(completion, max_length)
    return np.minimum(prompt, max_length - kept), kept
