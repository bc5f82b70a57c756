"""What memory operations hold, followed while they run on tensors that have shapes and no numbers."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

# What memory is held for, in the order in which it is told.
PARTS = ("weights", "reference", "gradients", "optimizer", "activations", "head", "workspace")

# Bytes of each of them.
Event = tuple[int, ...]

# Of what lies in another memory, and is not counted.
ELSEWHERE = "elsewhere"


def _grouped_product(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **options: Any) -> Tensor:
    """[T, N] of rows [T, K] and a matrix [K, N] for each group; [G, K, N] of two matrices of all groups' rows."""
    if a.dim() == 2 and b.dim() == 2:
        assert offs is not None
        shape: tuple[int, ...] = (len(offs), a.shape[0], b.shape[1])
    else:
        shape = (*(a.shape[:-1] if a.dim() <= b.dim() else a.shape[1:-1]), b.shape[-1])
    return a.new_empty(shape, dtype=options.get("out_dtype"))


_DEVICE = torch.ops.prim.device.default
# What torch refuses without numbers, of dtypes that it takes with them.
_SHAPES = {torch.ops.aten._grouped_mm.default: _grouped_product}


class MemoryTracker(TorchDispatchMode):
    """Counts the storages that operations return in the block, from their making until nobody holds them.

    Every operation goes through here, those of the backward among them, so that what autograd keeps, what checkpointing
    computes again and what stands in memory for a moment alone are counted as they come and go. Entered around fake
    tensors, whose storages have sizes and no memory, it tells what the same calls would hold on a device.

    Args:
        workspace: bytes that fastdpo's own operations take up inside, which nobody outside can see.

    Attributes:
        events: what was held of each part, each time that it became more.
        marks: (what was begun, the number of events before it).
    """

    def __init__(self, workspace: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._workspace = workspace
        self._held = dict.fromkeys((*PARTS, ELSEWHERE), 0)
        self._storages: dict[int, tuple[str, int]] = {}
        self._label = "activations"
        self.events: list[Event] = []
        self.marks: list[tuple[tuple[str, int], int]] = []

    @property
    def peak(self) -> dict[str, int]:
        """Part -> bytes, at the moment at which all together were most."""
        return dict(zip(PARTS, max(self.events, key=sum, default=(0,) * len(PARTS)), strict=True))

    def mark(self, name: tuple[str, int]) -> None:
        """What comes from now on belongs to this, until the next mark."""
        self.marks.append((name, len(self.events)))

    @property
    def held(self) -> dict[str, int]:
        """Part -> bytes, now."""
        return {part: self._held[part] for part in PARTS}

    @contextlib.contextmanager
    def labelled(self, part: str) -> Iterator[None]:
        """What is made in the block is of this part; it may be ``ELSEWHERE``."""
        before, self._label = self._label, part
        try:
            yield
        finally:
            self._label = before

    def add(self, part: str, count: int) -> None:
        """So many bytes more (or, below 0, less) that no operation has made."""
        self._held[part] += count
        self._look()

    def relabel(self, tensor: Tensor, part: str) -> None:
        """What ``tensor`` stands on is of this part from now on."""
        key = id(tensor.untyped_storage())
        if key in self._storages:
            before, size = self._storages[key]
            self._held[before] -= size
            self._held[part] += size
            self._storages[key] = part, size

    def for_a_moment(self, part: str, count: int) -> None:
        """So many bytes are needed now, and not any more afterwards."""
        self.add(part, count)
        self.add(part, -count)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DEVICE:  # asked for by all of torch, far more often than for anything else
            return args[0].device
        shapes = _SHAPES.get(func, func)
        result = shapes(*args, **(kwargs or {}))
        ours = func.namespace == "fastdpo"
        with self.labelled("head") if ours else contextlib.nullcontext():
            for tensor in tree_iter(result):
                if isinstance(tensor, torch.Tensor):
                    self._see(tensor)
        if ours:
            self.for_a_moment("workspace", self._workspace)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._storages:
            return
        size = storage.nbytes()
        self._storages[key] = self._label, size
        self._held[self._label] += size
        weakref.finalize(storage, self._forget, key).atexit = False
        self._look()

    def _forget(self, key: int) -> None:
        part, size = self._storages.pop(key)
        self._held[part] -= size

    def _look(self) -> None:
        self.events.append(tuple(self._held[part] for part in PARTS))
