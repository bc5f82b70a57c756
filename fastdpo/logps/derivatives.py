"""Which derivatives there are: first ones, in reverse. Any other is refused by name, where PyTorch would say less.

PyTorch's own ``once_differentiable`` lets a second derivative pass in silence where the gradient that comes in is a
constant: it returns gradients without a history, and whatever depended on them is taken for constant as well.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, ...]


def first_derivative(compute: Callable[..., Gradients], *inputs: Tensor | None) -> Gradients:
    """compute(*inputs), for a backward pass: the gradients, whose own derivative in the inputs raises.

    Args:
        inputs: also those that the gradients depend on in truth, though ``compute`` does not look at them.
    """
    if torch.compiler.is_compiling():  # which refuses second derivatives itself
        return compute(*inputs)
    gradients: Gradients = _FirstDerivative.apply(compute, *inputs)  # type: ignore[no-untyped-call]
    return gradients


class _FirstDerivative(torch.autograd.Function):
    @staticmethod
    def forward(compute: Callable[..., Gradients], *inputs: Tensor | None) -> Gradients:
        return compute(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Gradients) -> None:
        pass  # nothing is saved for what is not there

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> None:
        raise NotImplementedError(
            "fastdpo cannot differentiate twice: its log-probabilities and losses have first derivatives alone, and "
            "this needs a second one (a gradient penalty or a Hessian, through create_graph=True or torch.func). "
            "fastdpo.logps.oracle computes the same from full logits, differentiable any number of times"
        )

    @staticmethod
    def vmap(info: Any, in_dims: Any, *_: Any) -> None:
        raise NotImplementedError(
            "fastdpo's backward pass cannot be vmapped (as torch.func.jacrev does): call backward once "
            "for each gradient"
        )


def refuse_forward_mode(ctx: Any, *_: Any) -> None:
    """For a Function's ``jvp``."""
    raise NotImplementedError(
        "fastdpo has no forward-mode derivatives (torch.func.jvp, jacfwd, hessian, torch.autograd.forward_ad): use "
        "reverse mode, such as backward, torch.func.grad or torch.func.vjp"
    )
