"""Small builds of the reference cache, of a reference that is a function of token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor

from fastdpo.ref_cache import build as ref_build
from fastdpo.ref_cache.build import ReferenceBuilder

IDENTITY = {
    "weights": "ab" * 32,
    "config": {"model_type": "llama", "rope_theta": 10000.0},
    "weights_dtype": "float32",
    "compute_dtype": "bfloat16",
    "tokenizer": "cd" * 32,
    "chat_template": "ef" * 32,
    "max_length": 512,
    "truncation_mode": "keep_start",
    "masking": "fastdpo.data.PreferenceCollator",
}


def token_rows(count: int = 11) -> Dataset:
    """Rows of different lengths."""
    return Dataset.from_list(
        [
            {
                "prompt_ids": list(range(1, 2 + i % 5)),
                "chosen_ids": list(range(3, 4 + i)),
                "rejected_ids": list(range(5, 7 + i % 3)),
            }
            for i in range(count)
        ]
    )


def score(rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    """Log-probabilities that depend on the whole row, and on the rows beside it, as rounding does in a padded batch."""
    padding = 1e-3 * max(len(row["chosen_ids"]) for row in rows)
    values = [(sum(row["prompt_ids"]), sum(row["chosen_ids"]), sum(row["rejected_ids"])) for row in rows]
    return (
        torch.tensor([-(7 * p + c) - padding for p, c, _ in values]),
        torch.tensor([-(7 * p + r) - padding for p, _, r in values]),
    )


def builder(root: Path, score: ref_build.ScoreRows = score, **changes: Any) -> ReferenceBuilder:
    identity = IDENTITY | changes
    return ReferenceBuilder(
        root, Accelerator(cpu=True), lambda: identity, score, about={"model": "toy"}, show_progress=False
    )


def logps(dataset: Dataset) -> list[tuple[float, float]]:
    return list(zip(dataset["ref_chosen_logps"][:], dataset["ref_rejected_logps"][:], strict=True))


def never(rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
    raise AssertionError("nothing was to be computed")


class Stop(Exception):
    pass


def failing_after(calls: int) -> ref_build.ScoreRows:
    """A scorer that raises at the call after the first ``calls``."""
    left = [calls]

    def scorer(rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        left[0] -= 1
        if left[0] < 0:
            raise Stop
        return score(rows)

    return scorer


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "torn":
        path.write_bytes(content[: len(content) // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
