"""The load-balancing loss of a mixture of experts, of other tokens than those of one forward.

It is a function of what the routers say of each token (Fedus et al., Switch Transformers, arXiv 2101.03961, equations 4
to 6), over all tokens of a padded batch but its padding. So it is the same where what routers said of a token that
stands once is given as often as the padded batch has the token, and where it is given of several forwards together.
Models of transformers call a function of theirs for it; that function is called here, with other tokens.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fastdpo.model.language_model import described

# By what name modules of transformers have the function, and what it takes.
_LOSS = "load_balancing_loss_func"
_TAKES = {"gate_logits", "attention_mask"}


@dataclass(frozen=True)
class LossCall:
    """A call of a model's load-balancing loss.

    Attributes:
        function: the model's.
        arguments: by name.
    """

    function: Callable[..., Tensor]
    arguments: dict[str, Any]

    def logits_of(self, tokens: int) -> list[Tensor]:
        """What the router of each layer said of so many tokens N: [..., N, experts]."""
        logits: tuple[Tensor, ...] = self.arguments["gate_logits"]
        return [x.flatten(0, -2) if x.shape[:-1].numel() == tokens else x for x in logits]

    @property
    def mask(self) -> Tensor | None:
        """[N], 0 on padding; None where there is none."""
        mask: Tensor | None = self.arguments.get("attention_mask")
        return None if mask is None else mask.flatten()

    def of(self, logits: Iterable[Tensor], mask: Tensor | None) -> Tensor:
        """The loss of other tokens, as if they were one row."""
        others = {"gate_logits": tuple(logits), "attention_mask": None if mask is None else mask[None]}
        return self.function(**{**self.arguments, **others})


def calls_known_function(lm: PreTrainedModel) -> bool:
    """Whether the model's code has the function; that it calls it, and for all of its loss, is seen by running it."""
    return _names_of(lm) is not None


@contextlib.contextmanager
def recorded_losses(lm: PreTrainedModel, model_kwargs: dict[str, Any]) -> Iterator[list[LossCall]]:
    """A list that gets the calls of the model's function, where ``model_kwargs`` ask for the loss.

    It stays empty where the model has another function, or none.
    """
    calls: list[LossCall] = []

    def record(function: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
        calls.append(LossCall(function, arguments))
        return function(**arguments)

    with _in_its_place(lm, record if model_kwargs.get("output_router_logits") else None):
        yield calls


@contextlib.contextmanager
def repeated_tokens(
    lm: PreTrainedModel, tokens: int, index: Tensor | None, model_kwargs: dict[str, Any]
) -> Iterator[None]:
    """A forward of one row whose loss, where ``model_kwargs`` ask for it, is of other tokens than the row's.

    Args:
        lm: the language model.
        tokens: of the row.
        index: [M] int64, places in the row: the tokens that the loss is of; None for those of the row.
        model_kwargs: what the model is called with.

    Raises:
        NotImplementedError: the model computes its loss in a way of its own.
    """
    if index is None or not model_kwargs.get("output_router_logits"):
        yield
        return

    def repeated(call: LossCall) -> Tensor:
        logits = (x.index_select(-2, index) for x in call.logits_of(tokens))
        return call.of(logits, None if call.mask is None else call.mask.index_select(0, index))

    words = "of which tokens that stand once in place of several times cannot be told; use packing='repeated'"
    with _of_others(lm, repeated, f"{words} (--packing repeated), or"):
        yield


@contextlib.contextmanager
def gathered_tokens(
    lm: PreTrainedModel,
    tokens: int,
    gather: Callable[[list[Tensor]], list[Tensor]],
    mask: Tensor | None,
    model_kwargs: dict[str, Any],
) -> Iterator[None]:
    """A forward of some of a batch's tokens whose loss, where ``model_kwargs`` ask for it, is of all of them.

    Args:
        lm: the language model.
        tokens: N, in the forward.
        gather: what the routers of the layers said of these, [..., N, experts] each, to what they said of all tokens.
        mask: of all tokens, 0 on padding; None where there is none.
        model_kwargs: what the model is called with.

    Raises:
        NotImplementedError: the model computes its loss in a way of its own.
    """
    if not model_kwargs.get("output_router_logits"):
        yield
        return

    def of_all(call: LossCall) -> Tensor:
        return call.of(gather(call.logits_of(tokens)), mask)

    with _of_others(
        lm, of_all, "which cannot be had of rows that are cut over processes; use processes that have whole rows, or"
    ):
        yield


@contextlib.contextmanager
def _of_others(lm: PreTrainedModel, loss: Callable[[LossCall], Tensor], words: str) -> Iterator[None]:
    """A forward in which ``loss`` stands for the model's function; it has to call that once."""
    calls = 0

    def other(function: Callable[..., Tensor], arguments: dict[str, Any]) -> Tensor:
        nonlocal calls
        calls += 1
        return loss(LossCall(function, arguments))

    with _in_its_place(lm, other):
        yield
    if calls != 1:
        raise NotImplementedError(
            f"{described(lm)} computes its load-balancing loss in a way of its own, {words} no such loss "
            "(router_aux_loss_coef=0)"
        )


def loss_of_all(calls: Sequence[LossCall]) -> Tensor:
    """The loss of the tokens of several forwards, each of padded rows."""
    masks = [mask for mask in (call.mask for call in calls) if mask is not None]
    logits = [call.logits_of(len(mask)) for call, mask in zip(calls, masks, strict=True)]
    return calls[0].of((torch.cat(layer, dim=-2) for layer in zip(*logits, strict=True)), torch.cat(masks))


def _names_of(lm: PreTrainedModel) -> dict[str, Any] | None:
    """Where the model's forward finds the function by its name; None where it does not know it."""
    for kind in type(lm).__mro__:
        forward = vars(kind).get("forward")
        names: dict[str, Any] = getattr(inspect.unwrap(forward), "__globals__", {}) if callable(forward) else {}
        function = names.get(_LOSS)
        if function is not None and inspect.signature(function).parameters.keys() >= _TAKES:
            return names
    return None


@contextlib.contextmanager
def _in_its_place(
    lm: PreTrainedModel, other: Callable[[Callable[..., Tensor], dict[str, Any]], Tensor] | None
) -> Iterator[None]:
    """``other`` is called in place of the model's function, with it and its arguments; None leaves it be."""
    names = None if other is None else _names_of(lm)
    if other is None or names is None:
        yield
        return
    function = names[_LOSS]
    signature = inspect.signature(function)
    names[_LOSS] = lambda *args, **kwargs: other(function, dict(signature.bind(*args, **kwargs).arguments))
    try:
        yield
    finally:
        names[_LOSS] = function
