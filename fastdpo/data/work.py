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


@dataclass
class GroupWork:
    """Mean tokens of a step of groups, whose pairs share answers.

    Attributes:
        batch_size: groups a step.
        pairs: of them, in the mean.
        padded: tokens of two padded rows a pair; as many through the body as through the head.
        pairs_body, pairs_head: tokens where each pair is packed by itself, its prompt once.
        packed_body, packed_head: tokens where each prompt and each answer stands once.
    """

    batch_size: int
    pairs: float
    padded: float
    pairs_body: float
    pairs_head: float
    packed_body: float
    packed_head: float


def estimate_group_work(
    prompts: np.ndarray, answers: np.ndarray, group_of: np.ndarray, pairs: np.ndarray, batch_size: int
) -> GroupWork:
    """From lengths once cut, for batches drawn at random.

    Args:
        prompts, answers: [A] tokens of each answer, and of what is left of the prompt before it.
        group_of: [A] its group, rising from 0.
        pairs: [P, 2] answers.
        batch_size: groups a step.
    """
    groups = int(group_of[-1]) + 1
    size = min(batch_size, groups)

    def in_groups(values: np.ndarray, of: np.ndarray = group_of) -> np.ndarray:
        return np.bincount(of, values, minlength=groups)

    # With keep_end answers may keep different parts of the prompt, which cannot be shared.
    longest = np.zeros(groups, prompts.dtype)
    np.maximum.at(longest, group_of, prompts)
    is_one = in_groups(prompts != longest[group_of]) == 0
    of_prompts = np.where(is_one, longest, in_groups(prompts))
    chosen, rejected = pairs.T
    pair_group = group_of[chosen]
    before = np.where(prompts[chosen] == prompts[rejected], prompts[chosen], prompts[chosen] + prompts[rejected])
    heads = answers - (prompts == 0)  # without a prompt the first token is not predicted
    width = np.zeros(groups, prompts.dtype)
    np.maximum.at(width, group_of, prompts + answers)
    counts = in_groups(np.ones(len(pairs)), pair_group)
    random, whole = np.random.default_rng(0), groups // size * size
    padded = []
    for _ in range(min(_ENOUGH_ORDERS, -(-_ENOUGH_PAIRS // whole))):
        order = random.permutation(groups)[:whole].reshape(-1, size)
        padded.append(2 * counts[order].sum(1) * width[order].max(1))
    steps = size / groups
    return GroupWork(
        batch_size=size,
        pairs=steps * len(pairs),
        padded=float(np.concatenate(padded).mean()),
        pairs_body=steps * float((before + answers[chosen] + answers[rejected]).sum()),
        pairs_head=steps * float((heads[chosen] + heads[rejected]).sum()),
        packed_body=steps * float(of_prompts.sum() + answers.sum()),
        packed_head=steps * float(heads.sum()),
    )


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
    sides = [cut_lengths(prompt, side, max_length, truncation_mode) for side in (chosen, rejected)]
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


def cut_lengths(
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
