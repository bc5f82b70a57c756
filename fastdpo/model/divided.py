"""Padded rows in several forwards, each of rows that are about as long, scored as if it had been one."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from fastdpo.model.head import FusedHead, HeadOutput
from fastdpo.model.padded_parts import joined

# By what name modules of transformers have their load-balancing loss, and what it takes.
_LOSS = "load_balancing_loss_func"
_TAKES = {"gate_logits", "attention_mask"}


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
        model_output=SimpleNamespace(aux_loss=_of_all(losses)) if losses else None,
    )


@contextlib.contextmanager
def _alone(called: nn.Module, *, is_last: bool) -> Iterator[None]:
    """A forward in which a process waits for no other, unless it is the last one."""
    with contextlib.nullcontext() if is_last or not isinstance(called, DistributedDataParallel) else called.no_sync():
        yield


# --------------------------------------------------------------------------------------------------------------------
# The load-balancing loss
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """A call of a model's load-balancing loss: the function, and its arguments by name."""

    function: Callable[..., Tensor]
    arguments: dict[str, Any]


@contextlib.contextmanager
def recorded_losses(lm: PreTrainedModel, model_kwargs: dict[str, Any]) -> Iterator[list[_Call]]:
    """A list that gets the calls of transformers' function for the load-balancing loss, where that was asked for.

    It stays empty where the model has another, or none.
    """
    calls: list[_Call] = []
    module = sys.modules[type(lm).__module__]
    function: Callable[..., Tensor] | None = getattr(module, _LOSS, None)
    if function is None or not model_kwargs.get("output_router_logits"):
        yield calls
        return
    signature = inspect.signature(function)
    if not signature.parameters.keys() >= _TAKES:
        yield calls
        return

    def record(*args: Any, **kwargs: Any) -> Tensor:
        call = _Call(function, dict(signature.bind(*args, **kwargs).arguments))
        calls.append(call)
        return call.function(*args, **kwargs)

    setattr(module, _LOSS, record)
    try:
        yield calls
    finally:
        setattr(module, _LOSS, function)


def _of_all(calls: Sequence[_Call]) -> Tensor:
    """The loss of all forwards' tokens."""
    layers = zip(*(call.arguments["gate_logits"] for call in calls), strict=True)
    gate_logits = tuple(torch.cat([x.flatten(0, -2) for x in layer]) for layer in layers)
    # As of one row.
    mask = torch.cat([call.arguments["attention_mask"].flatten() for call in calls])[None]
    first = calls[0]
    return first.function(**{**first.arguments, "gate_logits": gate_logits, "attention_mask": mask})
