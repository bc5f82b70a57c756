"""Losses, gradients and weights that are no numbers any more, noticed without a wait of their own on a device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastdpo.trainer.zero import local_part


@dataclass
class NotFinite:
    """What was not finite in an optimiser step, as far as this process saw it.

    Attributes:
        step: the first such step, from 1 on.
        rows: of each micro-batch, the positions in it of the rows whose losses are not finite.
        gradients: names of the parameters whose gradients are not.
        trained: how many parameters had a gradient.
        norm: the gradients' norm is not finite.
    """

    step: int
    rows: list[list[int]] = field(default_factory=list)
    gradients: list[str] = field(default_factory=list)
    trained: int = 0
    norm: bool = False


class FiniteWatch:
    """Looks at the losses and the gradients of each step.

    On a CPU they are read at once. A device writes a few flags a step, which are copied to the host while the next step
    is computed, and read when that one is. On several processes all hear of it after the same step.
    """

    def __init__(self) -> None:
        self._losses: list[list[tuple[Tensor, Tensor | None]]] = []
        self._names: list[str] = []
        self._gradients: Tensor | None = None
        self._norm: Tensor | None = None
        self._pending: list[_Flags] = []

    def begin_batch(self) -> None:
        """What is seen from here on is of another micro-batch of the step."""
        self._losses.append([])

    def see_losses(self, losses: Tensor, rows: Tensor | None = None) -> None:
        """Those of a micro-batch's rows [B]; or of a part of it, with the positions of its rows, rising [b]."""
        if not self._losses:
            self.begin_batch()
        self._losses[-1].append((torch.isfinite(losses.detach()), rows))

    def see_gradients(self, model: nn.Module) -> None:
        """Those of a whole step, before they are clipped."""
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        # DeepSpeed has taken them away, and made the step: their norm tells.
        self._names, self._gradients = list(gradients), _are_finite(gradients.values()) if gradients else None

    def see_norm(self, norm: Tensor | float) -> None:
        """That of the gradients: a sum of squares, which may be infinite where none of them is."""
        norm = norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)
        self._norm = torch.isfinite(norm.detach()).reshape(1)

    def end_of_step(self, step: int, device: torch.device) -> NotFinite | None:
        """What is known by now of steps up to this one; None where all was finite.

        Args:
            step: the number of the step, from 1 on, before the optimiser's.
            device: of the model.
        """
        batches = [_in_order(parts) for parts in self._losses if parts]
        flags = [*batches, *(part for part in (self._gradients, self._norm) if part is not None)]
        sizes = [len(batch) for batch in batches]
        if flags:
            names = self._names if self._gradients is not None else []
            self._pending.append(_Flags(step, torch.cat([part.to(device) for part in flags]), sizes, names))
        self._losses, self._gradients, self._norm = [], None, None
        return self._read(keep=0 if device.type == "cpu" else 1)

    def all_so_far(self) -> NotFinite | None:
        """The same of every step that ended; waits for the device."""
        return self._read(keep=0)

    def _read(self, keep: int) -> NotFinite | None:
        while len(self._pending) > keep:
            found = self._pending.pop(0).read()
            if found is not None:
                self._pending = []
                return found
        return None


def _in_order(parts: list[tuple[Tensor, Tensor | None]]) -> Tensor:
    """What is known of the rows of a micro-batch's parts, in the order of the rows."""
    flags = torch.cat([flags for flags, _ in parts])
    rows = [rows for _, rows in parts if rows is not None]
    return flags[torch.cat(rows).argsort()] if len(rows) == len(parts) > 1 else flags


class _Flags:
    """Whether the numbers of one step are finite, on their way to the host."""

    def __init__(self, step: int, flags: Tensor, sizes: list[int], names: list[str]) -> None:
        self._step, self._sizes, self._names = step, sizes, names
        everywhere = flags.all().to(torch.uint8)[None]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MIN)
        packed = torch.cat([everywhere, flags.to(torch.uint8)])
        self._event: torch.Event | None = None
        if packed.device.type == "cpu":
            self._host = packed
        else:
            # Pinned, or the copy would wait for the device.
            self._host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
            self._host.copy_(packed, non_blocking=True)
            self._event = torch.Event(packed.device)
            self._event.record()

    def read(self) -> NotFinite | None:
        if self._event is not None:
            self._event.synchronize()
        everywhere, *flags = self._host.tolist()
        if everywhere:
            return None
        pairs, begin = [], 0
        for size in self._sizes:
            pairs.append([i for i, flag in enumerate(flags[begin : begin + size]) if not flag])
            begin += size
        end = begin + len(self._names)
        gradients = [name for name, flag in zip(self._names, flags[begin:end], strict=True) if not flag]
        return NotFinite(self._step, pairs, gradients, len(self._names), norm=not all(flags[end:]))


def weights_not_finite(model: nn.Module) -> list[str]:
    """Names of the parameters, or of this process's shards of them, with a NaN or an infinity; waits for the device."""
    parts = {name: local_part(parameter) for name, parameter in model.named_parameters()}
    parameters = {name: p for name, p in parts.items() if p.dtype.is_floating_point and p.dtype.itemsize > 1}
    if not parameters:
        return []
    flags = _are_finite(parameters.values()).tolist()
    return [name for name, flag in zip(parameters, flags, strict=True) if not flag]


@torch.no_grad()
def _are_finite(tensors: Iterable[Tensor]) -> Tensor:
    """bool [tensors], on the first one's device; what is empty is finite."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    local = [tensor.coalesce().values() if tensor.is_sparse else tensor for tensor in local]
    local = [tensor if tensor.numel() else tensor.new_zeros(1) for tensor in local]
    # The largest magnitude, which is NaN where anything is.
    norms = torch._foreach_norm(local, float("inf"))
    return torch.isfinite(torch.stack([norm.to(norms[0].device) for norm in norms]))
