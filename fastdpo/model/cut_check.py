"""Whether a model computes the same in rows that are cut over processes as in whole ones.

That it attends through transformers' interface, and honours the positions that it is given, is not taken on trust:
made-up rows are scored both ways, padded ones, and packed ones where the run has these. Layers that carry a state from
token to token do not survive the cut, for one.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastdpo.data.sequences import TokenSequence
from fastdpo.data.terms import first_line
from fastdpo.logps.wide import segment_sums
from fastdpo.model.attention import RowAttention
from fastdpo.model.cut_heads import HeadCutAttention
from fastdpo.model.cut_rows import CutAttention
from fastdpo.model.head_calls import IGNORE_INDEX
from fastdpo.model.language_model import described
from fastdpo.model.model_check import made_up_tokens
from fastdpo.model.packing import pack
from fastdpo.model.packing_check import PLAIN_LAYERS, window_not_passed_on
from fastdpo.model.precision import looked_at
from fastdpo.model.recurrent import kinds_of_layers
from fastdpo.model.rounding import at_most_rounding, moved_by_last_place
from fastdpo.model.scoring import Scorer, evaluating, score_row

# A rank has two chunks of so many tokens, and a token is missing at the end.
_CHUNK = 12


def check_cut(scorer: Scorer, device: torch.device, dtype: torch.dtype) -> None:
    """See that it does, by three forwards of two rows, and by two of a packed one.

    Args:
        scorer: the model, with the ranks that rows are cut over; under the autocast that it is to run in.
        device: where it runs.
        dtype: what it computes in.

    Raises:
        NotImplementedError: it does not, or cannot be run so; the message names the model, and says what to use.
    """
    name, config = described(scorer.lm), scorer.lm.config.get_text_config()
    advice = "Use processes that have whole sequences (neither cp_size nor sp_size)"
    assert isinstance(scorer.attention, (CutAttention, HeadCutAttention))
    if others := kinds_of_layers(scorer.lm) - set(PLAIN_LAYERS):
        raise NotImplementedError(
            f"{name} has layers of the kind {', '.join(sorted(others))}, which are not supported in rows that are cut "
            f"over processes. {advice}"
        )
    try:
        with torch.no_grad(), evaluating(scorer.root), scorer.attention.watched() as windows:
            scorer.head.inspect_once(scorer.root)
            moved, allowed = looked_at(scorer.model, device, dtype, lambda seen_in: _moved(scorer, device, seen_in))
    except (torch.OutOfMemoryError, NotImplementedError):
        raise
    except Exception as error:  # models fail in their own ways when they are called in one that they do not know
        raise NotImplementedError(
            f"{name} does not take rows that are cut over processes: its forward stops there ({type(error).__name__}: "
            f"{first_line(str(error))}). {advice}"
        ) from error
    # The rows are short, and training's may be longer than any window.
    if words := window_not_passed_on(config, windows, None):
        raise NotImplementedError(f"{name} {words}, as rows that are cut over processes need. {advice}")
    if not moved <= allowed:
        raise NotImplementedError(
            f"{name} computes something else in rows that are cut over processes than in whole ones: log-probabilities "
            f"differ by {moved:.2g} nats, where {allowed:.2g} would be rounding. {advice}"
        )


def _moved(scorer: Scorer, device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """By how much sums of made-up rows differ, and how much of that may be rounding, in nats."""
    assert scorer.cut is not None
    width = 2 * _CHUNK * dist.get_world_size(scorer.cut) - 1
    ids = made_up_tokens(scorer, device, 2 * width).view(2, width)
    mask = torch.ones_like(ids)
    mask[1, -_CHUNK:] = 0
    batch = {"input_ids": ids, "attention_mask": mask, "completion_mask": mask}
    labels = ids.masked_fill(mask == 0, IGNORE_INDEX)

    def whole() -> Tensor:
        return scorer.head(scorer.root, ids, mask, labels).logps.double()

    before = whole()
    with moved_by_last_place(scorer.lm):
        noise = whole() - before
    error = (scorer.score(batch).sums.squeeze(1) - before.sum(1)).abs() / mask.sum(1).sqrt()
    moved = float(error.max())
    rows = getattr(scorer.attention, "rows", None)
    if rows is not None:
        moved = max(moved, _moved_in_row(scorer, rows, ids))
    return moved, at_most_rounding(float(before.abs().max()), noise, dtype)


def _moved_in_row(scorer: Scorer, attention: RowAttention, ids: Tensor) -> float:
    """The same of a packed row, in which two completions follow a prompt."""
    first, second = ids.tolist()
    prompt = _CHUNK - 1
    sequences = [TokenSequence(first, prompt, []), TokenSequence(first[:prompt] + second[prompt:-3], prompt, [])]
    row = pack(sequences, shared=True, least=1).to(ids.device)
    with attention.active():
        whole = row.of_sequences(score_row(scorer.head, scorer.root, row).logps.double())
    part = {"row": row, "pairs": torch.tensor([[0, 1]], device=ids.device)}
    tokens = row.cu_seqlens.diff()
    error = (scorer.score(part).sums.squeeze(1) - segment_sums(whole, row.cu_seqlens)).abs() / tokens.sqrt()
    return float(error.max())
