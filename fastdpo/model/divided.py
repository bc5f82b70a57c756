"""Padded rows in several forwards, each of rows that are about as long, scored as if it had been one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastdpo.model.head import FusedHead, HeadOutput
from fastdpo.model.load_balancing import loss_of_all, recorded_losses
from fastdpo.model.padded_parts import joined


def score_divided(
    head: FusedHead,
    called: nn.Module,
    part: dict[str, Any],
    labels: Tensor,
    outputs: Sequence[str],
    model_kwargs: dict[str, Any],
) -> HeadOutput:
    """What the head says of a micro-batch with ``forwards``, see :func:`fastdpo.model.padded_parts.forwards_of`.

    The ``model_output`` has ``aux_loss`` alone: the load-balancing loss of all rows' tokens, where it was asked for.

    Args:
        head: of the model.
        called: the root module.
        part: the micro-batch.
        labels: [R, T] int64, -100 where nothing is to be scored.
        outputs: other fields of :class:`HeadOutput` to compute.
        model_kwargs: passed on to the model.
    """
    forwards = part["forwards"]
    ids, mask = part["input_ids"], part["attention_mask"]
    found = []
    with recorded_losses(head.lm, model_kwargs) as losses:
        for i, (rows, width) in enumerate(forwards):
            cut = (rows, slice(width))
            # Processes may have different numbers of forwards: they meet in the last one.
            with _alone(called, is_last=i + 1 == len(forwards)):
                found.append(head(called, ids[cut], mask[cut], labels[cut], outputs=outputs, **model_kwargs))

    def together(name: str) -> Tensor:
        return joined([getattr(out, name) for out in found], forwards, labels.shape[1] - 1)

    def asked(name: str) -> Tensor | None:
        return together(name) if name in outputs else None

    return HeadOutput(
        logps=together("logps"),
        mask=together("mask"),
        entropy=asked("entropy"),
        log_sum_sq_probs=asked("log_sum_sq_probs"),
        mean_logits=asked("mean_logits"),
        is_top1=asked("is_top1"),
        model_output=SimpleNamespace(aux_loss=loss_of_all(losses)) if losses else None,
    )


@contextlib.contextmanager
def _alone(called: nn.Module, *, is_last: bool) -> Iterator[None]:
    """A forward in which a process waits for no other, unless it is the last one."""
    with contextlib.nullcontext() if is_last or not isinstance(called, DistributedDataParallel) else called.no_sync():
        yield
