"""Which layout a run uses: the one with the least work that the model can be seen to compute right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from fastdpo.model.attention import RowAttention
from fastdpo.model.attention_backends import RowsNotSupportedError
from fastdpo.model.packing import LAYOUTS
from fastdpo.model.packing_check import RowsCheck, check_rows
from fastdpo.model.scoring import Scorer, are_alike

_DESCRIPTIONS = {
    "shared": "packed rows, common beginnings once",
    "repeated": "packed rows, the prompt before each completion",
    "padded": "padded rows, one for each completion",
}


@dataclass(frozen=True)
class Packing:
    """A layout of :data:`fastdpo.model.packing.LAYOUTS`, and how it came to be chosen.

    Attributes:
        layout: the layout.
        backend: what computes the attention of packed rows; None for padded ones.
        reasons: why a layout with less work was not chosen.
    """

    layout: str
    backend: str | None = None
    reasons: tuple[str, ...] = ()

    def __str__(self) -> str:
        by = f" (attention: {self.backend})" if self.backend else ""
        return "; ".join([f"{_DESCRIPTIONS[self.layout]}{by}", *self.reasons])

    def attention_of(self, model: PreTrainedModel | PeftModel) -> RowAttention | None:
        """What ``model`` needs to take the batches; None for padded rows."""
        return None if self.backend is None else RowAttention(model, self.backend)

    def require(
        self,
        scorer: Scorer,
        max_length: int | None,
        device: torch.device,
        dtype: torch.dtype,
        row_tokens: int | None = None,
    ) -> None:
        """:func:`fastdpo.model.packing_check.check_rows`, of a layout that was chosen ``unchecked``.

        Raises:
            NotImplementedError: the model does not suit; the message says why.
        """
        if self.backend is None:
            return
        try:
            check_rows(scorer, self.layout, self.backend, max_length, device, dtype, row_tokens)
        except RowsNotSupportedError as error:
            raise NotImplementedError(
                f"the batches are laid out in {self}, but {error}. Use packing='padded' (--packing padded)"
            ) from error


def obstacles_in(
    *,
    has_own_collator: bool,
    pad_to_multiple_of: int | None,
    torch_compile: bool,
    has_own_aux_loss: bool,
    has_dropout: bool,
    has_images: bool = False,
    is_cut: bool = False,
) -> dict[str, str | None]:
    """Layout -> why a run with these settings cannot have it, or None.

    Args:
        has_own_collator: the caller gave a collator.
        pad_to_multiple_of: what the length of a batch is to be a multiple of; None for no such wish.
        torch_compile: the model is compiled.
        has_own_aux_loss: the loss has a load-balancing term that the model computes in a way of its own.
        has_dropout: the policy has a dropout that is not 0.
        has_images: rows have images.
        is_cut: sequences are cut over processes.
    """
    packed = shared = None
    if has_own_collator:
        packed = "data_collator is given, and makes the batches"
    elif is_cut:
        packed = "sequences are cut over processes by cp_size, as packed rows cannot be (by sp_size they can)"
    elif has_images:
        packed = "rows have images, which are laid out by sequences"
    elif pad_to_multiple_of is not None:
        packed = f"pad_to_multiple_of is {pad_to_multiple_of}, and packed rows are not padded"
    elif torch_compile:
        packed = "torch_compile is on, and every packed row would be compiled anew"
    elif has_own_aux_loss:
        shared = (
            "the model computes its load-balancing loss in a way of its own, in which a prompt counts once for each "
            "completion"
        )
    elif has_dropout:
        shared = "dropout is active, and completions that share a prompt would share its noise"
    return {"shared": packed or shared, "repeated": packed}


def choose_packing(
    packing: str,
    scorers: Sequence[Scorer],
    *,
    obstacles: dict[str, str | None],
    max_length: int | None,
    device: torch.device,
    row_tokens: int | None = None,
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    unchecked: bool = False,
) -> Packing:
    """The layout to use.

    Args:
        packing: one of :data:`fastdpo.model.packing.PACKINGS`. ``auto`` takes the first of ``shared``, ``repeated`` and
            ``padded`` that suits; any other is taken, or refused.
        scorers: the models that must all suit it: the policy and the reference.
        obstacles: layout -> why the run's other settings rule it out, or None.
        max_length: most tokens of a sequence; None for no limit.
        device: where the models run.
        row_tokens: most tokens of a row; None for no limit.
        autocast: makes the context that they run in.
        unchecked: the models cannot be run yet: leave :meth:`Packing.require` to the caller.

    Raises:
        NotImplementedError: the layout that was asked for does not suit; the message says why.
    """
    reasons: list[str] = []
    find = _BackendFinder(scorers, max_length, row_tokens, device, autocast, unchecked)
    for layout in LAYOUTS if packing == "auto" else (packing,):
        if layout == "padded":
            return Packing(layout, None, tuple(reasons))
        reason = obstacles.get(layout)
        if reason is None:
            try:
                return Packing(layout, find(layout), tuple(reasons))
            except RowsNotSupportedError as error:
                reason = str(error)
        if reason not in reasons:
            reasons.append(reason)
    raise NotImplementedError(f"packing is {packing!r}, but {reasons[0]}. Use packing='auto', or 'padded'")


def backends_for(lm: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """What may compute the attention of packed rows, the fastest first: the kind that the model was loaded with.

    A model that was not loaded with one of its own kind (``flash_attention_2`` and the like, ``flex_attention``) gets
    torch's variable-length flash attention on CUDA in 16 bits, unless it was loaded with ``eager``.

    Args:
        lm: the language model.
        device: where it runs.
        dtype: what it computes in.
    """
    own = lm.config._attn_implementation or "eager"
    if "flash" in own:
        return ("flash", "sdpa")
    if own == "flex_attention":
        return ("flex", "sdpa")
    if own != "eager" and device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return ("varlen", "sdpa")
    return ("sdpa",)


class _BackendFinder:
    """Finds the first back end with which a layout is right; the models' truths are computed once for all layouts."""

    def __init__(
        self,
        scorers: Sequence[Scorer],
        max_length: int | None,
        row_tokens: int | None,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[None]],
        unchecked: bool,
    ) -> None:
        self._autocast, self._unchecked = autocast, unchecked
        with autocast():
            lm = scorers[0].lm
            kind = device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else lm.dtype
            self._candidates = backends_for(lm, device, dtype)
        different = [s for i, s in enumerate(scorers) if not any(are_alike(s, other) for other in scorers[:i])]
        self._checks = [RowsCheck(scorer, max_length, row_tokens, device, dtype) for scorer in different]

    def __call__(self, layout: str) -> str:
        """RowsNotSupportedError, for the last one's reason, if there is none."""
        if self._unchecked:
            return self._candidates[0]
        *faster, last = self._candidates
        with self._autocast():
            for backend in faster:
                with suppress(RowsNotSupportedError):
                    for check in self._checks:
                        check.check(layout, backend)
                    return backend
            for check in self._checks:
                check.check(layout, last)
            return last
