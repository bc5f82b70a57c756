"""Whether a sequence's log-probabilities depend on the padding behind it, and so on the batch that it is in."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from fastdpo.model.config_lengths import lengths_in, longest_position
from fastdpo.model.head_calls import IGNORE_INDEX
from fastdpo.model.language_model import described, vocabulary_rows
from fastdpo.model.made_up import UNLIMITED
from fastdpo.model.model_check import score_tokens
from fastdpo.model.precision import looked_at
from fastdpo.model.rounding import at_most_rounding
from fastdpo.model.scoring import Scorer, evaluating

_BEYOND = 24
_TRIES = 2
# In nats, what rewards can do without.
_LITTLE = 1e-3


def dependence_on_padding(
    scorer: Scorer, max_length: int | None, device: torch.device, dtype: torch.dtype
) -> str | None:
    """How log-probabilities depend on padding, in words; None where they do not.

    A made-up sequence is scored alone, and padded to a length beyond the longest one in the model's configuration that
    a sequence can pass: a short sequence, and one of more than twice as many tokens.

    Args:
        scorer: the model.
        max_length: most tokens of a sequence in training; None for no limit.
        device: where the model runs.
        dtype: what it computes in.
    """
    config = scorer.lm.config.get_text_config()
    limits = [limit for limit in (max_length, longest_position(config), UNLIMITED) if limit is not None]
    longest = min(limits)
    passed = [length for length in lengths_in(config) if length + 2 <= longest]
    most = longest - longest // 4  # and room for padding
    sizes = sorted({min(_BEYOND, most), *(min(2 * length + _BEYOND, most) for length in passed[-1:])})
    width = min(2 * sizes[-1], longest)

    def look(seen_in: torch.dtype) -> dict[int, float]:
        # All of them: processes of a sharded model have to run it equally often.
        return {
            size: max(_moved(scorer, size, width, seed, device, seen_in) for seed in range(_TRIES)) for size in sizes
        }

    with torch.no_grad(), evaluating(scorer.root):
        moved = looked_at(scorer.model, device, dtype, look)
    size = next((size for size, by in moved.items() if by > 0), None)
    if size is None:
        return None
    return (
        f"{described(scorer.lm)} lets what it says of a sequence depend on the padding behind it: log-probabilities of "
        f"{size} tokens moved by {moved[size]:.2g} nats. Rewards then depend on the batch that a pair is in; sequences "
        "of one length, or one pair a batch, have none of it"
    )


def _moved(scorer: Scorer, size: int, width: int, seed: int, device: torch.device, dtype: torch.dtype) -> float:
    """By how much log-probabilities move with padding up to ``width``, in nats; 0 where it may be rounding."""
    vocabulary = vocabulary_rows(scorer.lm)
    rng = random.Random(seed)
    ids = torch.tensor([[rng.randrange(vocabulary) for _ in range(size)]], device=device)
    alone = score_tokens(scorer, ids)
    moved = float((_padded(scorer, ids, width) - alone).abs().max())
    # Not what a change in the last place does: where ties decide what is attended to, that is as much.
    rounding = at_most_rounding(float(alone.abs().max()), torch.zeros_like(alone), dtype)
    return moved if moved > max(_LITTLE, rounding) else 0.0


def _padded(scorer: Scorer, ids: Tensor, width: int) -> Tensor:
    padding = (0, width - ids.shape[1])
    padded, mask = (torch.nn.functional.pad(x, padding) for x in (ids, torch.ones_like(ids)))
    labels = padded.masked_fill(mask == 0, IGNORE_INDEX)
    labels[:, 0] = IGNORE_INDEX
    return scorer.head(scorer.root, padded, mask, labels).logps[0, : ids.shape[1] - 1]
