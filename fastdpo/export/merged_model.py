"""An adapter merged into its base in memory, and compared with what it was before."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from peft import PeftConfig
from torch import Tensor
from transformers import PreTrainedModel

from fastdpo.export.likeness import Difference, Kept, difference, kept, logps_of, made_up_rows, tolerance
from fastdpo.export.live import MergeError, Source, is_quantized, load_base, put_adapters_on
from fastdpo.export.merging import embeddings_are_tied, merge
from fastdpo.model.language_model import embedding_rows, language_model


@dataclass(frozen=True)
class MergedModel:
    """A merged model, in float32, and how far it is from the live one.

    Attributes:
        source: what it was made of.
        model: the merged model, in evaluation mode.
        rows: token ids of what the models were asked.
        logps: what the live model said of them, see :func:`fastdpo.export.likeness.logps_of`.
        apart: merged from live.
        tolerance: what ``apart`` may be.
        base_logps: what the base without the adapter said of them; None for a model by itself.
        was_untied: input and output embedding were one before.
    """

    source: Source
    model: PreTrainedModel
    rows: list[list[int]]
    logps: Tensor
    apart: Difference
    tolerance: float
    base_logps: Tensor | None
    was_untied: bool = False

    @property
    def effect(self) -> Difference | None:
        """What the adapter does: the live model from its base."""
        return None if self.base_logps is None else difference(self.logps, self.base_logps)

    def check_kept(self, stored: Tensor, dtype: str, advice: str) -> Kept | None:
        """What is kept of the adapter by a model whose weights were rounded.

        Args:
            stored: its log-probabilities.
            dtype: what to.
            advice: what to do where it is lost.

        Raises:
            MergeError: less than half is, for the adapter's steps are smaller than those of ``dtype``.
        """
        found = None if self.base_logps is None else kept(self.base_logps, self.logps, stored)
        if found is not None and found.is_lost:
            raise MergeError(
                f"in {dtype}, {found} is kept of what the adapter does: its changes of weights are smaller than the "
                f"steps of {dtype}, and are lost in the rounding; nothing was kept. {advice}"
            )
        return found


def make_merged(
    source: Source,
    rows: Sequence[Sequence[int]] | None = None,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
    check_room: Callable[[PreTrainedModel], None] = lambda model: None,
) -> MergedModel:
    """Load what ``source`` names, merge it, and compare.

    Args:
        source: see :func:`fastdpo.export.live.source_of`.
        rows: token ids to compare on; by default made up, with what the adapter changes of the embeddings.
        device: where.
        trust_remote_code: as for ``from_pretrained``.
        check_room: called with the base before anything is computed; may raise.

    Raises:
        MergeError: it cannot be merged, or the merged model says something else than the live one.
    """
    base = load_base(source, device, trust_remote_code=trust_remote_code)
    check_room(base)
    if not source.adapters:
        if is_quantized(base):
            base = load_base(source, device, trust_remote_code=trust_remote_code, dequantize=True)
        asked = [list(row) for row in rows] if rows is not None else made_up_rows(base)
        logps, _ = logps_of(base, asked)
        return MergedModel(source, base, asked, logps, Difference(0.0, 0.0), 0.0, None)
    quantized, tied, size = is_quantized(base), embeddings_are_tied(base), embedding_rows(base)
    live: Any = put_adapters_on(base, source.adapters)
    del base
    asked = [list(row) for row in rows] if rows is not None else _rows_for(live, source, size)
    _check_tokens(live, asked)
    logps, largest_logit = logps_of(live, asked)
    if not bool(logps.isfinite().all()):
        raise MergeError(f"{' and '.join(source.adapters)}: the log-probabilities of the live model are no numbers")
    with live.disable_adapter():
        base_logps = logps_of(live, asked)[0]
    if quantized:
        # PEFT would round the sums to 4 bits again.
        del live
        gc.collect()
        base = load_base(source, device, trust_remote_code=trust_remote_code, dequantize=True)
        live = put_adapters_on(base, source.adapters)
        del base
    model = merge(live, tied=tied).eval()
    allowed = tolerance(model, largest_logit)
    apart = difference(logps, logps_of(model, asked)[0])
    if not apart.largest <= allowed:
        raise MergeError(
            f"the merged model is another than the adapter on its base: log-probabilities of tokens differ by {apart}, "
            f"where the order of sums explains {allowed:.2g}; nothing was written. Serve the adapter by itself"
        )
    is_tied = embeddings_are_tied(model)
    return MergedModel(source, model, asked, logps, apart, allowed, base_logps, was_untied=tied and not is_tied)


def _rows_for(live: Any, source: Source, size: int) -> list[list[int]]:
    """Made-up rows with the tokens whose embeddings the adapters have by themselves, or the base has not."""
    changed = set(range(size, embedding_rows(live)))
    for name in source.adapters:
        config = PeftConfig.from_pretrained(name)
        found = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
        changed |= set(itertools.chain(*found.values()) if isinstance(found, dict) else found)
    return made_up_rows(language_model(live), changed)


def _check_tokens(live: Any, rows: Sequence[Sequence[int]]) -> None:
    size = embedding_rows(live)
    highest = max(map(max, rows))
    if highest >= size:
        raise MergeError(f"a row to compare on has the token {highest}, and the model has embeddings for {size}")
