"""What a swapped output embedding does in one call of the model: score the target tokens, or send probes through."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor

from fastdpo.logps.low_rank import LowRankUpdate
from fastdpo.logps.outputs import TokenLogps
from fastdpo.logps.primitive import token_logps
from fastdpo.model.head_adapters import active_updates
from fastdpo.model.head_layers import check_adapter
from fastdpo.model.head_parts import HeadLayer, part_of
from fastdpo.model.logit_transform import LogitTransform, fit_transform, probes

IGNORE_INDEX = -100

# Log-probabilities leave the head times this. What models do to logits afterwards (a scale, a softcap) is then linear
# to within (100 * 2^-24)^2, and dividing by its slope undoes it; a power of two costs no precision.
_SHRINK = 2.0**-24


@dataclass(slots=True)
class Scoring:
    """One call that scores target tokens, and the results that do not pass through the model.

    Attributes:
        name: the model's, for messages.
        targets: [B, K] int64.
        columns: [K] int64, of the hidden states.
        width: T, how many of these a row has where the model computes all.
        only_columns: the model gives the output embedding the hidden states of these columns alone.
        outputs: other fields of :class:`fastdpo.logps.outputs.TokenLogps` to compute.
        transform: what the model does to logits afterwards.
        num_scored: how many targets are not ignored, where that is known.
        result: what was found; None before the output embedding was called.
    """

    name: str
    targets: Tensor
    columns: Tensor
    width: int
    only_columns: bool
    outputs: tuple[str, ...]
    transform: LogitTransform
    num_scored: int | None = None
    result: TokenLogps | None = None

    def __call__(self, head: HeadLayer, hidden: Tensor) -> Tensor:
        """[B, K, H] or [B, T, H] to [B, K, 1]: log-probabilities, shrunk to where any transform is linear."""
        if self.result is not None:
            raise NotImplementedError(f"{self.name} calls its output embedding more than once in a forward")
        part = part_of(head, self.name)
        batch, kept = self.targets.shape
        expected = kept if self.only_columns else self.width
        if hidden.shape[:-1] != (batch, expected):
            raise NotImplementedError(
                f"{self.name} gives its output embedding a tensor of shape {tuple(hidden.shape)}, where "
                f"({batch}, {expected}, {head.in_features}) was expected"
            )
        if not self.only_columns:
            hidden = hidden[:, self.columns]
        updates: tuple[LowRankUpdate, ...] = ()
        if isinstance(head, LoraLinear):
            check_adapter(head, self.name)  # another adapter may have come since
            updates = active_updates(head, hidden)
        self.result = token_logps(
            hidden,
            part.weight,
            self.targets,
            part.bias,
            ignore_index=IGNORE_INDEX,
            logit_scale=self.transform.scale,
            softcap=self.transform.softcap,
            outputs=self.outputs,
            num_scored=self.num_scored,
            low_rank=updates,
            group=part.group,
        )
        # Not a view: FSDP2 warns of those, whose hooks are lost where a model writes into its logits.
        return self.result.logps.unsqueeze(-1) * _SHRINK

    def logps_in(self, logits: Tensor) -> Tensor:
        """The log-probabilities [B, K] of what the model returned for logits."""
        assert self.result is not None, "the output embedding was not called"
        logps = self.result.logps
        if logits.shape != (*self.targets.shape, 1) or logits.dtype != logps.dtype:
            raise NotImplementedError(
                f"{self.name} turned the log-probabilities from {logps.dtype} of shape {(*self.targets.shape, 1)} "
                f"into {logits.dtype} of shape {tuple(logits.shape)} on their way out"
            )
        return logits.squeeze(-1) * (1 / (_SHRINK * self.transform.scale))


@dataclass(slots=True)
class Probing:
    """One call that asks what happens to logits after the output embedding.

    Attributes:
        name: the model's, for messages.
        sent: what was sent; None before the output embedding was called.
    """

    name: str
    sent: Tensor | None = None

    def __call__(self, head: HeadLayer, hidden: Tensor) -> Tensor:
        """Whatever comes in, [1, P, V] goes out."""
        dtype = torch.promote_types(head.weight.dtype, torch.float32)
        self.sent = probes(head.weight.shape[0], dtype, head.weight.device)
        return self.sent.clone()[None]  # some models write into their logits

    def transform_in(self, logits: Tensor) -> LogitTransform:
        """What happened, told by what the model returned for logits.

        Raises:
            NotImplementedError: it is not a scale and a softcap.
        """
        assert self.sent is not None, "the output embedding was not called"
        return fit_transform(self.sent, logits, self.name)
