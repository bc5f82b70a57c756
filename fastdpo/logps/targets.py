"""What is said of targets that are no entries of the vocabulary, wherever the host sees them."""

from __future__ import annotations

from torch import Tensor


def refuse_foreign_targets(targets: Tensor, scored: Tensor, vocabulary: Tensor | int, ignore_index: int) -> None:
    """IndexError where a scored target is no entry of the vocabulary; the host waits for the device."""
    wrong = (scored & ((targets < 0) | (targets >= vocabulary))).nonzero()
    if len(wrong):
        t = int(wrong[0])
        raise IndexError(
            f"targets[{t}] is {int(targets[t])}; it should be in [0, {int(vocabulary)}), the rows of weight, or "
            f"ignore_index ({ignore_index})"
        )
