"""DPOLoss: dpo_loss as a module."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch.distributed as dist
from torch import Tensor, nn

from fastdpo.logps.low_rank import LowRankUpdate
from fastdpo.loss.fused import dpo_loss
from fastdpo.loss.options import LossKeywords, LossOptions
from fastdpo.loss.outputs import DPOOutput

if TYPE_CHECKING:
    from typing_extensions import Unpack


class HeadKeywords(TypedDict, total=False):
    """The options of :func:`dpo_loss` that are not the loss's."""

    ignore_index: int
    logit_scale: float
    softcap: float | None
    temperature: float
    workspace: int | None
    outputs: Sequence[str]
    allow_empty: bool


class DPOLossKeywords(HeadKeywords, LossKeywords, total=False):
    """The options of :func:`dpo_loss`; the others of its arguments are :class:`DPOLossInputs`."""

    beta: float
    loss_type: str | Sequence[str]
    label_smoothing: float


class DPOLossInputs(TypedDict, total=False):
    """What :func:`dpo_loss` takes beside hidden, weight and targets: of one batch, or of one model."""

    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    ref_logps: Tensor | None
    bias: Tensor | None
    ref_bias: Tensor | None
    cu_seqlens: Tensor | None
    pairs: Tensor | None
    rankings: Tensor | None
    weights: Tensor | None
    margins: Tensor | None
    low_rank: LowRankUpdate | Sequence[LowRankUpdate]
    group: dist.ProcessGroup | None
    sequence_group: dist.ProcessGroup | None


_DEFAULTS: dict[str, Any] = {
    name: parameter.default
    for name, parameter in inspect.signature(dpo_loss).parameters.items()
    if name in DPOLossKeywords.__annotations__
}


class DPOLoss(nn.Module):
    """:func:`dpo_loss` as a module: the options are given once, the tensors at each call.

    Args:
        options: as those of :func:`dpo_loss`, with its defaults.

    Attributes:
        options: the same, by name.

    Raises:
        TypeError, ValueError: there is no such option; as :class:`fastdpo.LossOptions`.
    """

    def __init__(self, **options: Unpack[DPOLossKeywords]) -> None:
        super().__init__()
        self.options: dict[str, Any] = {**_DEFAULTS, **options}
        LossOptions(**{k: v for k, v in self.options.items() if k not in HeadKeywords.__annotations__})  # raises

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, **inputs: Unpack[DPOLossInputs]) -> DPOOutput:
        """Arguments, result and errors as of :func:`dpo_loss`, without the options."""
        return dpo_loss(hidden, weight, targets, **inputs, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
