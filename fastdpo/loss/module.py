"""DPOLoss: dpo_loss as a module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor, nn

from fastdpo.logps.low_rank import LowRankUpdate
from fastdpo.loss.fused import dpo_loss
from fastdpo.loss.options import LossKeywords, LossOptions
from fastdpo.loss.outputs import DPOOutput

if TYPE_CHECKING:
    from typing_extensions import Unpack


class DPOLoss(nn.Module):
    """:func:`dpo_loss` as a module: the options are given once, the tensors at each call.

    Args: as the options of :func:`dpo_loss`.
    """

    def __init__(
        self,
        *,
        beta: float = 0.1,
        loss_type: str | Sequence[str] = "sigmoid",
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        workspace: int | None = None,
        outputs: Sequence[str] = (),
        allow_empty: bool = False,
        **options: Unpack[LossKeywords],
    ) -> None:
        super().__init__()
        LossOptions(beta, loss_type, label_smoothing, **options)  # raises
        self.options = {
            "beta": beta,
            "loss_type": loss_type,
            "label_smoothing": label_smoothing,
            "ignore_index": ignore_index,
            "logit_scale": logit_scale,
            "softcap": softcap,
            "temperature": temperature,
            "workspace": workspace,
            "outputs": tuple(outputs),
            "allow_empty": allow_empty,
            **options,
        }

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_logps: Tensor | None = None,
        bias: Tensor | None = None,
        ref_bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        low_rank: LowRankUpdate | Sequence[LowRankUpdate] = (),
        group: dist.ProcessGroup | None = None,
        sequence_group: dist.ProcessGroup | None = None,
    ) -> DPOOutput:
        """Shapes, result and errors as in :func:`dpo_loss`."""
        return dpo_loss(
            hidden,
            weight,
            targets,
            ref_hidden=ref_hidden,
            ref_weight=ref_weight,
            ref_logps=ref_logps,
            bias=bias,
            ref_bias=ref_bias,
            cu_seqlens=cu_seqlens,
            low_rank=low_rank,
            group=group,
            sequence_group=sequence_group,
            **self.options,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
