"""Which layout a run uses: the one with the least work that the model can be seen to compute right.

Whether a model honours our attention and our positions is not taken on trust: a made-up row is scored in the layout
and padded, and the two must agree.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from fastdpo.data.prepare import PreferenceCollator
from fastdpo.model.attention import RowAttention
from fastdpo.model.attention_backends import RowsNotSupportedError
from fastdpo.model.head import IGNORE_INDEX
from fastdpo.model.packing import LAYOUTS, PackedRow, RowCollator
from fastdpo.model.scoring import Scorer, evaluating, score_row

if TYPE_CHECKING:
    from fastdpo.trainer.config import DPOConfig

_DESCRIPTIONS = {
    "shared": "packed rows, each prompt once",
    "repeated": "packed rows, the prompt before each completion",
    "padded": "padded rows, two a pair",
}

# The tokens of the made-up pairs: prompt, chosen, rejected.
_LENGTHS = ((7, 5, 4), (1, 3, 6), (4, 1, 9))

# What a layout may differ by from padded rows, in units of the last place of the largest log-probability: the same
# numbers, summed in another order in every layer.
_ROUNDING = 64
# In 16 bits rounding is not far below what a wrong attention changes, and says less: a share of the latter then.
_SHARE = 0.1

# Layers whose tokens meet in the attention alone.
_LAYER_TYPES = ("full_attention", "sliding_attention", "attention")


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
        return None if self.layout == "padded" else RowAttention(model, self.backend)

    def require(self, scorer: Scorer, max_length: int | None, device: torch.device, dtype: torch.dtype) -> None:
        """:func:`check_rows`, of a layout that was chosen ``unchecked``.

        Raises:
            NotImplementedError: the model does not suit; the message says why.
        """
        if self.layout == "padded":
            return
        try:
            check_rows(scorer, self.layout, self.backend, max_length, device, dtype)
        except RowsNotSupportedError as error:
            raise NotImplementedError(
                f"the batches are laid out in {self}, but {error}. Use packing='padded' (--packing padded)"
            ) from error


def obstacles_in(
    args: DPOConfig, *, has_own_collator: bool, has_aux_loss: bool, has_dropout: bool
) -> dict[str, str | None]:
    """Layout -> why a run with these settings cannot have it, or None.

    Args:
        args: the run's.
        has_own_collator: the caller gave a collator.
        has_aux_loss: the loss has a load-balancing term.
        has_dropout: the policy has a dropout that is not 0.
    """
    packed = shared = None
    if has_own_collator:
        packed = "data_collator is given, and makes the batches"
    elif args.pad_to_multiple_of is not None:
        packed = f"pad_to_multiple_of is {args.pad_to_multiple_of}, and packed rows are not padded"
    elif args.torch_compile:
        packed = "torch_compile is on, and every packed row would be compiled anew"
    elif has_aux_loss:
        shared = "the load-balancing loss of a mixture of experts counts a prompt once for each completion"
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
    autocast: Callable[[], AbstractContextManager[None]] = nullcontext,
    unchecked: bool = False,
) -> Packing:
    """The layout to use.

    Args:
        packing: one of :data:`fastdpo.model.packing.PACKINGS`. ``auto`` takes the first of ``shared``, ``repeated`` and
            ``padded`` that suits; any other is taken, or refused.
        scorers: the models that must all suit it: the policy and the reference.
        obstacles: layout -> why the run's other settings rule it out, or None.
        max_length: most tokens of a sequence.
        device: where the models run.
        autocast: makes the context that they run in.
        unchecked: the models cannot be run yet: leave :meth:`Packing.require` to the caller.

    Raises:
        NotImplementedError: the layout that was asked for does not suit; the message says why.
    """
    reasons: list[str] = []
    for layout in LAYOUTS if packing == "auto" else (packing,):
        if layout == "padded":
            return Packing(layout, None, tuple(reasons))
        reason = obstacles.get(layout)
        if reason is None:
            try:
                backend = _find_backend(scorers, layout, max_length, device, autocast, unchecked)
                return Packing(layout, backend, tuple(reasons))
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


def _find_backend(
    scorers: Sequence[Scorer],
    layout: str,
    max_length: int | None,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager[None]],
    unchecked: bool,
) -> str:
    """The first back end with which the layout is right; RowsNotSupportedError, for the last one's reason, if none."""
    with autocast():
        lm = scorers[0].lm
        kind = device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else lm.dtype
        candidates = backends_for(lm, device, dtype)
        if unchecked:
            return candidates[0]
        *faster, last = candidates
        for backend in faster:
            with suppress(RowsNotSupportedError):
                for scorer in scorers:
                    check_rows(scorer, layout, backend, max_length, device, dtype)
                return backend
        for scorer in scorers:
            check_rows(scorer, layout, last, max_length, device, dtype)
        return last


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
    error = float((packed - padded).abs().max())
    # Models take norms and softmaxes in float32, also in float64.
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    rounding = _ROUNDING * eps * float(padded.abs().max())
    allowed = min(rounding, _SHARE * float((plain - padded).abs().max()))
    # Written so that NaN is refused.
    if not error <= allowed:
        raise RowsNotSupportedError(
            f"{name} computes something else in packed rows than in padded ones: log-probabilities of a made-up row "
            f"differ by {error:.2g} nats, where {allowed:.2g} would be rounding"
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
        return RowCollator(layout, collate)(rows)["micro_batches"][0]["row"].to(device)

    row, changed_row = row_of(pairs), row_of(changed)
    with attention.watched() as windows:
        packed = score_row(head, root, row).logps
    with attention.active():
        moved = score_row(head, root, changed_row).logps - packed
    plain = head.score_row(root, row.input_ids, row.scored, row.targets).logps
    leak = float(moved[_LENGTHS[0][1] :].abs().max())
    return padded, packed, plain, leak, windows
