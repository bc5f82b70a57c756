"""Where transformers 5 reads, or trains, the parts of a model that it spreads over processes wrongly: found and mended.

Each of these is silent there: the run goes on with other weights than the files', or with other gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, Interleave, MergeModulelist, WeightConverter

from fastdpo.data.terms import first_line
from fastdpo.model.language_model import described, language_model

# By what from_pretrained is told to cut a model.
CUTS = ("distributed_config", "tp_plan", "tp_size")

_INSTEAD = (
    "Leave distributed_config out, and have the weights sharded by FSDP2 (accelerate launch --use_fsdp --fsdp_version "
    "2 -m fastdpo train …)"
)

# The style of a plan for parameters that each rank has whole, and each of whose ranks sees a part of the gradient of.
_SUMMED_STYLE = "ReplicatedWithGradAllReduce.install_forward"


@contextlib.contextmanager
def naming_cut_model(name: str, init_kwargs: Mapping[str, Any]) -> Iterator[None]:
    """While a model of this name is loaded with these: what stops transformers where it cuts it, by its name.

    Plans of some families contradict each other, or what is read of their files.
    """
    try:
        yield
    except (torch.OutOfMemoryError, OSError, NotImplementedError):
        raise
    except (RuntimeError, ValueError, AssertionError, LookupError) as error:
        if all(init_kwargs.get(setting) is None for setting in CUTS):
            raise
        raise NotImplementedError(
            f"{name} cannot be cut over processes as it is loaded: transformers stops there ({type(error).__name__}: "
            f"{first_line(str(error))}). {_INSTEAD}"
        ) from error


def check_read_in_parts(model: PreTrainedModel | PeftModel) -> None:
    """See that what each process read of the weights is its part of what a whole model has.

    A weight may be made of several tensors of the files, or be a part of one. transformers has each process read its
    part of every tensor, and puts these together, or takes them apart, as if they were whole: what it joins along the
    dimension that is cut comes out in another order.

    Raises:
        NotImplementedError: it is not; the message names the weight, and says what to use.
    """
    lm = language_model(model)
    conversions = getattr(lm, "_weight_conversions", None) or ()
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    if not converters:
        return
    back = [each.reverse_transform() for each in converters]
    for name, parameter in lm.named_parameters():
        if not isinstance(parameter, DTensor):
            continue
        name = name.replace(".base_layer", "")  # of an adapter's layer
        for converter, reverse in zip(converters, back, strict=True):
            wrong = [type(op).__name__ for op in converter.operations if not _is_right_on_parts(op, parameter)]
            if wrong and reverse.rename_source_key(name)[1] is not None:
                raise NotImplementedError(
                    f"{described(lm)} is cut over processes as it is loaded (distributed_config), and transformers "
                    f"makes {name}, which is cut, from the tensors of the files ({', '.join(wrong)}) only after each "
                    f"process has read its part of them, so that its rows come out in another order. {_INSTEAD}"
                )


def _is_right_on_parts(operation: Any, parameter: DTensor) -> bool:
    """Whether what the operation makes of parts is a part of what it makes of whole tensors."""
    if isinstance(operation, MergeModulelist):
        return True  # a process reads those of the list that it has
    if not isinstance(operation, (Concatenate, Interleave)):
        return False
    cut = {place.dim % parameter.ndim for place in parameter.placements if hasattr(place, "dim")}
    return operation.dim % parameter.ndim not in cut


def sum_gradients_once(model: nn.Module) -> None:
    """Have each backward's gradient summed over the ranks that see a part of it, and not what was added up before.

    A plan leaves some parameters whole on every rank (norms of each head's queries and keys, for one), and each rank
    sees a part of their gradient. transformers sums what has been accumulated, after every backward: of several a step,
    the first one's gradient is counted once for each rank, and so on.
    """
    for module in model.modules():
        around: Any = vars(module).get("forward")
        if _SUMMED_STYLE not in getattr(around, "__qualname__", ""):
            continue
        held = _closure(around)
        after_it_is_added = held["_all_reduce_grad"]
        for parameter in module.parameters(recurse=False):
            hooks = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
            for key in [key for key, hook in hooks.items() if hook is after_it_is_added]:
                del hooks[key]
        group = _closure(after_it_is_added)["mesh"].get_group()
        module.forward = _Summing(module, held["original_forward"], group)


def summed_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Those that :func:`sum_gradients_once` has summed."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), _Summing):
            yield from module.parameters(recurse=False)


def _closure(function: Any) -> dict[str, Any]:
    """What the function has of the one that it is in, by name."""
    cells = (cell.cell_contents for cell in function.__closure__)
    return dict(zip(function.__code__.co_freevars, cells, strict=True))


class _Summing:
    """A module's forward, the gradients of whose parameters are summed over ``group``."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any], group: dist.ProcessGroup) -> None:
        self._module, self._forward, self._group = module, forward, group
        self._seen: dict[str, nn.Parameter] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Only here: until then the parameters may be others, which hold nothing, or shards.
        if torch.is_grad_enabled():
            for name, parameter in self._module.named_parameters(recurse=False):
                if parameter.requires_grad and self._seen.get(name) is not parameter:
                    parameter.register_hook(self._summed)
                    self._seen[name] = parameter
        return self._forward(*args, **kwargs)

    def _summed(self, gradient: Tensor) -> Tensor:
        whole = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole, group=self._group)
        return whole
