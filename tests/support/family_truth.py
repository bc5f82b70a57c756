"""What a model's log-probabilities are, obviously right: each sequence alone, whole logits, float64 where it goes."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import torch
from float64 import KeepFloat64
from tiny_families import VOCABULARY
from torch import Tensor
from transformers import PreTrainedModel

from fastdpo.data.collator import PreferenceCollator
from fastdpo.model.attention import RowAttention
from fastdpo.model.row_collator import RowCollator
from fastdpo.model.scoring import Scorer, score_row

# Tokens of prompt, chosen and rejected: sequences of 2 to 700, around every window, at many offsets in a row.
LENGTHS = ((7, 5, 4), (1, 1, 3), (260, 40, 130), (4, 1, 9), (60, 640, 5), (3, 62, 65), (1, 8, 4))


def made_up_rows(seed: int = 0, lengths: tuple[tuple[int, int, int], ...] = LENGTHS) -> list[dict[str, list[int]]]:
    rng = random.Random(seed)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")

    def tokens(count: int) -> list[int]:
        return [rng.randrange(3, VOCABULARY - 1) for _ in range(count)]

    return [dict(zip(names, map(tokens, counts), strict=True)) for counts in lengths]


@contextlib.contextmanager
def widest(model: PreTrainedModel, differentiable: bool) -> Iterator[None]:
    """float64 models stay in float64."""
    keep = KeepFloat64() if model.dtype == torch.float64 else contextlib.nullcontext()
    with keep, torch.set_grad_enabled(differentiable):
        yield


def alone(model: PreTrainedModel, rows: list[dict[str, list[int]]], *, differentiable: bool = False) -> list[Tensor]:
    """The log-probabilities of each completion's tokens, chosen ones first, of each sequence alone from its logits."""
    found = []
    takes_cache = model.config.model_type not in ("xlm", "reformer")
    with widest(model, differentiable):
        for side in ("chosen_ids", "rejected_ids"):
            for row in rows:
                ids = torch.tensor([row["prompt_ids"] + row[side]])
                options = {"use_cache": False} if takes_cache else {}
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **options).logits[0]
                wide = torch.promote_types(logits.dtype, torch.float32)
                logps = logits.to(wide).log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
                found.append(logps[-len(row[side]) :])
    return found


def laid_out(
    scorer: Scorer,
    layout: str,
    backend: str | None,
    rows: list[dict[str, list[int]]],
    *,
    differentiable: bool = False,
) -> list[Tensor]:
    """The same by the fused head, in a layout."""
    collate = PreferenceCollator(pad_token_id=0)
    sizes = [len(row[side]) for side in ("chosen_ids", "rejected_ids") for row in rows]
    with widest(scorer.lm, differentiable):
        if layout == "padded":
            batch = collate(rows)
            labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
            out = scorer.head(scorer.root, batch["input_ids"], batch["attention_mask"], labels)
            return list(out.logps[out.mask].split(sizes))
        row = RowCollator(layout, collate)(rows)["micro_batches"][0]["row"]
        scorer.head.inspect_once(scorer.root)
        with RowAttention(scorer.model, backend).active():
            logps = row.of_sequences(score_row(scorer.head, scorer.root, row).logps)
        in_pairs = logps.split(row.cu_seqlens.diff().tolist())
        return [*in_pairs[0::2], *in_pairs[1::2]]
