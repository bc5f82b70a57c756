"""Whether experts that are spread over processes compute what whole ones do.

transformers sends each token to the processes that have its experts, or has each of them compute what it can. The
oracle is the layer itself with the weights of all experts, as one process would have it, on the tokens of this process.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from transformers import PreTrainedModel

from fastdpo.model.language_model import cannot_run, described
from fastdpo.model.load_sharding import sizes_of
from fastdpo.model.model_check import made_up_tokens, score_tokens
from fastdpo.model.scoring import Scorer, evaluating

# Of the root of the mean square: sums of as many terms in another order, and of rounded ones.
_ROUNDINGS = 16.0


def spread_experts(lm: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of the layers whose experts are spread over processes."""
    for name, module in lm.named_modules():
        if any(is_of_experts(parameter) for parameter in module.parameters(recurse=False)):
            yield name, module


def is_of_experts(parameter: Tensor) -> bool:
    """Whether processes of expert parallelism have a part of the parameter each."""
    return isinstance(parameter, DTensor) and "ep" in (parameter.device_mesh.mesh_dim_names or ())


def check_experts(scorer: Scorer, device: torch.device, dtype: torch.dtype) -> None:
    """See that they do, in the first layer of each kind; nothing where none are spread.

    To be called by all processes together. The weights of one layer's experts are brought together for it.

    Args:
        scorer: the model, under the autocast that it is to run in.
        device: where it runs.
        dtype: what it computes in.

    Raises:
        NotImplementedError: they do not, or cannot be run; the message names the layer.
    """
    kinds = {type(module): (name, module) for name, module in reversed(list(spread_experts(scorer.lm)))}
    for name, module in kinds.values():
        off, computed_in = _off(scorer, module, device)
        # All hear of it, or those who did not would wait for the others.
        worst = torch.tensor(off, device=device)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        allowed = _ROUNDINGS * max(torch.finfo(kind).eps for kind in (dtype, computed_in))
        if not float(worst) <= allowed:
            raise NotImplementedError(
                f"{described(scorer.lm)} computes something else with its experts spread over processes than with all "
                f"of them in one: {name} is off by {float(worst):.2g} of what it should give, where {allowed:.2g} "
                "would be rounding. Leave ep_size out of distributed_config"
            )


def _off(scorer: Scorer, module: nn.Module, device: torch.device) -> tuple[float, torch.dtype]:
    """How far the layer is from the whole one, on made-up tokens that are others on processes with other data."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []

    def see(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        seen.append((args, kwargs, output))

    ids = made_up_tokens(scorer, device)
    ids = ids.roll(dist.get_rank() // sizes_of(scorer.model)["tp"], dims=1)
    try:
        with torch.no_grad(), evaluating(scorer.root):
            scorer.head.inspect_once(scorer.root)
            hook = module.register_forward_hook(see, with_kwargs=True)
            try:
                score_tokens(scorer, ids)
            finally:
                hook.remove()
    except (torch.OutOfMemoryError, NotImplementedError):
        raise
    except Exception as error:
        raise cannot_run(scorer.lm, "with its experts spread over processes", error) from error
    args, kwargs, found = seen[0]
    with torch.no_grad():
        expected = _of_whole(module, args, kwargs)
    scale = expected.float().square().mean().sqrt()
    off = (found.float() - expected.float()).square().mean().sqrt() / scale.clamp(min=1e-30)
    return float(off), found.dtype


def _of_whole(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What the layer gives with all experts, by the forward of its own class."""
    kind = type(module)
    if isinstance(module, FSDPModule):
        kind = kind.__mro__[2]  # the class that FSDP2 took the layer from
    whole = kind.__new__(kind)
    vars(whole).update({name: value for name, value in vars(module).items() if name != "forward"})
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        vars(whole)[hooks] = OrderedDict()
    weights = {
        name: parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        for name, parameter in module.named_parameters()
    }
    experts = next(len(weights[name]) for name, parameter in module.named_parameters() if is_of_experts(parameter))
    vars(whole).update(num_experts=experts, _is_expert_parallel=False)
    result: Tensor = functional_call(whole, weights, args, kwargs)
    return result
