"""Which tokens of a sequence that is too long are kept: the one place that decides it."""

from __future__ import annotations

TRUNCATION_MODES = ("keep_start", "keep_end")


def check_truncation(max_length: int | None, truncation_mode: str) -> None:
    """Raises ValueError for what cannot be meant."""
    if truncation_mode not in TRUNCATION_MODES:
        raise ValueError(f"truncation_mode must be one of {', '.join(TRUNCATION_MODES)}, got {truncation_mode!r}.")
    # One token has no predecessor to be predicted from.
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must be at least 2 (or None for no limit), got {max_length}.")


def cut(
    prompt: list[int],
    completion: list[int],
    max_length: int | None,
    truncation_mode: str,
    completion_mask: list[int] | None = None,
) -> tuple[list[int], list[int]]:
    """(ids, mask of the tokens that are scored) of one sequence, at most ``max_length`` long.

    Args:
        prompt, completion: their ids.
        max_length, truncation_mode: how much of both stays, and which end of it.
        completion_mask: 1 on the completion's tokens that count; None, or empty, for all of them.
    """
    ids, mask = prompt + completion, [0] * len(prompt) + (completion_mask or [1] * len(completion))
    if max_length is None or len(ids) <= max_length:
        return ids, mask
    if truncation_mode == "keep_start":
        return ids[:max_length], mask[:max_length]
    return ids[-max_length:], mask[-max_length:]
