"""Whether a model computes the same in packed rows as in padded ones.

That it honours our attention and our positions is not taken on trust: a made-up row is scored in the layout and padded,
and the two must agree.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from fastdpo.data.collator import PreferenceCollator
from fastdpo.model.attention import RowAttention
from fastdpo.model.attention_backends import RowsNotSupportedError
from fastdpo.model.head_calls import IGNORE_INDEX
from fastdpo.model.packing import PackedRow, RowCollator
from fastdpo.model.scoring import Scorer, evaluating, score_row

# The tokens of the made-up pairs: prompt, chosen, rejected.
_LENGTHS = ((7, 5, 4), (1, 3, 6), (4, 1, 9))

# What a layout may differ by from padded rows, in units of the last place of the largest log-probability: the same
# numbers, summed in another order in every layer.
_ROUNDING = 64
# In 16 bits rounding is not far below what a wrong attention changes, and says less: a share of the latter then.
_SHARE = 0.1

# Layers whose tokens meet in the attention alone.
_LAYER_TYPES = ("full_attention", "sliding_attention", "attention")


def check_rows(
    scorer: Scorer, layout: str, backend: str, max_length: int | None, device: torch.device, dtype: torch.dtype
) -> None:
    """Score made-up pairs in packed rows and in padded ones, and see that they agree.

    Args:
        scorer: the model.
        layout: ``shared`` or ``repeated``.
        backend: one of :data:`fastdpo.model.attention.BACKENDS`.
        max_length: most tokens of a sequence in training; None for no limit.
        device: where the model runs.
        dtype: what it computes in.

    Raises:
        RowsNotSupportedError: they do not agree, or the model cannot do it; the message says why.
    """
    name = f"{type(scorer.lm).__name__} (model_type {scorer.lm.config.model_type!r})"
    config = scorer.lm.config.get_text_config()
    layer_types = getattr(config, "layer_types", None) or ()
    others = sorted(set(layer_types) - set(_LAYER_TYPES))
    if others:
        raise RowsNotSupportedError(f"{name} has layers of the kind {', '.join(others)}")
    try:
        attention = RowAttention(scorer.model, backend)
        with torch.no_grad(), evaluating(scorer.root):
            padded, packed, plain, leak, windows = _score_made_up(scorer, attention, layout, device)
    except torch.OutOfMemoryError:
        raise
    except RowsNotSupportedError:
        raise
    except Exception as error:
        # Models fail in their own ways when they are called in one that they do not know.
        line = (str(error).splitlines() or [""])[0]
        raise RowsNotSupportedError(f"{name} does not take packed rows ({type(error).__name__}: {line})") from error
    if not windows:
        raise RowsNotSupportedError(f"the attention of {name} does not go through transformers' attention interface")
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if window is not None and (max_length is None or window < max_length):
        sliding = layer_types.count("sliding_attention") if layer_types else len(windows)
        if sum(w is not None for w in windows) < sliding:
            raise RowsNotSupportedError(
                f"{name} has a sliding window of {window} tokens, which it does not pass on to its attention"
            )
    difference = float((packed - padded).abs().max())
    # Models take norms and softmaxes in float32, also in float64.
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    rounding = _ROUNDING * eps * float(padded.abs().max())
    allowed = min(rounding, _SHARE * float((plain - padded).abs().max()))
    # Written so that NaN is refused.
    if not difference <= allowed:
        raise RowsNotSupportedError(
            f"{name} computes something else in packed rows than in padded ones: log-probabilities of a made-up row "
            f"differ by {difference:.2g} nats, where {allowed:.2g} would be rounding"
        )
    # The same shapes and the same numbers give the same bits; but how many tokens an expert gets depends on others.
    if leak > 0 and not hasattr(config, "output_router_logits"):
        raise RowsNotSupportedError(
            f"{name} lets one completion of a packed row depend on another: its log-probabilities moved by {leak:.2g} "
            "nats when the other's tokens changed"
        )


def _score_made_up(
    scorer: Scorer, attention: RowAttention, layout: str, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, float, list[int | None]]:
    """Log-probabilities [K] from padded rows, from the packed row, and from the row taken for one plain text; how much
    other completions' moved when the first one's tokens changed; the sliding windows that the attention was given."""
    head, root = scorer.head, scorer.root
    head.inspect_once(root)
    vocabulary = scorer.lm.get_output_embeddings().weight.shape[0]
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(vocabulary) for _ in range(count)]

    pairs = [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), map(tokens, n), strict=True)) for n in _LENGTHS]
    changed = [{**pairs[0], "chosen_ids": tokens(_LENGTHS[0][1])}, *pairs[1:]]
    collate = PreferenceCollator(pad_token_id=0)
    batch = {name: values.to(device) for name, values in collate(pairs).items()}
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, IGNORE_INDEX)
    out = head(root, batch["input_ids"], batch["attention_mask"], labels)
    padded = out.logps[out.mask]

    def row_of(rows: list[dict[str, list[int]]]) -> PackedRow:
        row: PackedRow = RowCollator(layout, collate)(rows)["micro_batches"][0]["row"]
        return row.to(device)

    row, changed_row = row_of(pairs), row_of(changed)
    with attention.watched() as windows:
        packed = score_row(head, root, row).logps
    with attention.active():
        moved = score_row(head, root, changed_row).logps - packed
    plain = head.score_row(root, row.input_ids, row.scored, row.targets).logps
    leak = float(moved[_LENGTHS[0][1] :].abs().max())
    return padded, packed, plain, leak, windows
