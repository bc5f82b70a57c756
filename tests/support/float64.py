"""Keeps float64 models in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class KeepFloat64(TorchFunctionMode):
    """Models take norms and softmaxes in float32 whatever their dtype. In here float64 stays float64.

    Two ways to compute the same differ in the last place; rounded to float32 on the way, some differ in its last place.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(args[0] if args else None, Tensor) and args[0].dtype == torch.float64:
            if function is Tensor.float or (
                function in (Tensor.to, Tensor.type)
                and (torch.float32 in args[1:] or kwargs.get("dtype") == torch.float32)
            ):
                return args[0]
            if function in (F.softmax, torch.softmax, Tensor.softmax) and kwargs.get("dtype") == torch.float32:
                kwargs = {**kwargs, "dtype": torch.float64}
        return function(*args, **kwargs)
