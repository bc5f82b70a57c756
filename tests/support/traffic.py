"""What a process gives to collectives: which, how often, and how many bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Of c10d's ops, which argument a process sends: an all-reduce works in place, the others take what they send second.
_SENT = {
    "allreduce_": 0,
    "allgather_": 1,
    "_allgather_base_": 1,
    "_reduce_scatter_base_": 1,
    "reduce_scatter_": 1,
    "alltoall_base_": 1,
}


class Traffic(TorchDispatchMode):
    """Counts the collectives in a ``with`` block, of the thread that it is in; any that it does not know is an error.

    Attributes:
        calls: by the op's name.
        sent: bytes that this process gave to them, by the op's name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")  # type: ignore[attr-defined]
        if namespace == "c10d":
            tensors = [x for x in tree_leaves(args[_SENT[name]]) if isinstance(x, Tensor)]
            self.calls[name] += 1
            self.sent[name] += sum(x.nbytes for x in tensors)
        return func(*args, **(kwargs or {}))
