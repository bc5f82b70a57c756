"""Batches of pairs as dpo_loss takes them, and the same from full logits in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from loss_cases import Tokens
from torch import Tensor

from fastdpo.logps import oracle as reference
from fastdpo.logps.native import operand_dtype
from fastdpo.logps.outputs import TokenLogps


@dataclass
class Batch:
    """2B rows, chosen ones first: a prompt, a completion with holes, padding."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    targets: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    model: dict[str, Any]

    def policy(self) -> dict[str, Any]:
        """dpo_loss's arguments but for the reference."""
        return {"hidden": self.hidden, "weight": self.weight, "bias": self.bias, "targets": self.targets, **self.model}

    def double(self) -> Batch:
        names = ("hidden", "weight", "bias", "ref_hidden", "ref_weight")
        return replace(self, **{name: getattr(self, name).detach().double() for name in names})

    def room_for(self, rows: int) -> int:
        """The workspace in which groups keep so many tokens' exponentials."""
        sums = 4 * self.weight.numel() if self.weight.element_size() == 2 else 0
        return sums + rows * len(self.weight) * operand_dtype(self.weight.dtype).itemsize

    def with_leaves(self) -> tuple[Batch, list[Tensor]]:
        """The batch on copies that need gradients, and these: hidden, weight, bias."""
        leaves = [x.detach().clone().requires_grad_() for x in (self.hidden, self.weight, self.bias)]
        return replace(self, hidden=leaves[0], weight=leaves[1], bias=leaves[2]), leaves

    def pairs(self, pairs: Sequence[int]) -> Batch:
        """The batch of some pairs, in this order."""
        rows = [*pairs, *(len(self.targets) // 2 + pair for pair in pairs)]
        return replace(self, hidden=self.hidden[rows], targets=self.targets[rows], ref_hidden=self.ref_hidden[rows])

    def padded(self, before: int, after: int) -> Batch:
        """Every row longer, by positions that are not scored."""
        return replace(
            self,
            hidden=F.pad(self.hidden, (0, 0, before, after), value=3.0),
            targets=F.pad(self.targets, (before, after), value=-100),
            ref_hidden=F.pad(self.ref_hidden, (0, 0, before, after), value=-3.0),
        )

    def packed(self, dtype: torch.dtype = torch.int64) -> tuple[Batch, Tensor]:
        """Its rows' scored tokens, holes and one prompt position, one after another, and cu_seqlens."""
        scored = self.targets != -100
        inside = (scored.cumsum(1) > 0) & (scored.flip(1).cumsum(1).flip(1) > 0)
        keep = inside | (torch.arange(self.targets.shape[1]) == 0)
        cu_seqlens = F.pad(keep.sum(1).cumsum(0), (1, 0)).to(dtype)
        rows = replace(self, hidden=self.hidden[keep], targets=self.targets[keep], ref_hidden=self.ref_hidden[keep])
        return rows, cu_seqlens

    def outputs(self) -> TokenLogps:
        """The policy's, from full logits, in the batch's dtype."""
        return reference.token_logps(self.hidden, self.weight, self.targets, self.bias, **self.model)

    def ref_logps(self) -> Tensor:
        """The reference's log-probabilities of tokens, from full logits, in the batch's dtype."""
        return reference.token_logps(
            self.ref_hidden, self.ref_weight, self.targets, self.bias.detach(), **self.model
        ).logps

    def tokens(self) -> Tokens:
        """What the oracle of the losses takes, connected to the batch's leaves."""
        policy = self.outputs()
        return Tokens(self.targets != -100, policy.logps, self.ref_logps(), policy.log_sum_sq_probs)


def make_batch(seed: int, pairs: int, length: int, h: int, v: int, dtype: torch.dtype, **model: Any) -> Batch:
    """Completions of 1 to ``length`` tokens; a reference near the policy, as it is in training."""
    g = torch.Generator().manual_seed(seed)
    rows = 2 * pairs
    targets = torch.randint(0, v, (rows, length), generator=g)
    start = torch.randint(0, length, (rows, 1), generator=g)
    size = torch.randint(1, length + 1, (rows, 1), generator=g)
    position = torch.arange(length)
    holes = (torch.rand(rows, length, generator=g) < 0.2) & (position != start)
    targets[(position < start) | (position >= start + size) | holes] = -100
    hidden = torch.randn(rows, length, h, generator=g)
    weight = torch.randn(v, h, generator=g) / h**0.5
    noise = [0.2 * torch.randn(x.shape, generator=g) for x in (hidden, weight)]
    bias = torch.randn(v, generator=g) / 2
    tensors = (hidden, weight, bias, hidden + noise[0], weight + noise[1] / h**0.5)
    hidden, weight, bias, ref_hidden, ref_weight = (x.to(dtype) for x in tensors)
    return Batch(hidden, weight, bias, targets, ref_hidden, ref_weight, model)
