"""Whether ranks that cut layers over each other agree on the gradients of what each of them has whole.

Activations between a layer that is cut by columns and one that is cut by rows are in parts, and a weight that is used
there sees a part of its gradient on each rank. A plan has to say so, for the parts to be summed; where one is silent,
each rank trains a copy of its own, or all of them the mean of the parts.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from fastdpo.model.cut_weights import summed_parameters
from fastdpo.model.language_model import described, language_model

# Of a gradient's norm: sums in another order are far below, parts of it far above.
_ALLOWED = 0.02
# Of the largest of the norms: what is smaller may be rounding alone, which ranks do not agree on.
_NOISE = 1e-4


class AlikeGradients:
    """Looks at the first gradients of a step, and is then done.

    Args:
        model: cut by tensor parallelism; what is trained is known, and nothing has been run backward for it.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        self._model = model
        mesh: Any = language_model(model)._device_mesh
        self._group = mesh["tp"].get_group()
        self._seen: dict[str, Tensor] = {}
        self._handles: dict[str, RemovableHandle] = {}
        summed = {id(parameter) for parameter in summed_parameters(model)}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor) and id(parameter) not in summed:
                # What is added up is averaged over the ranks, and tells nothing.
                self._handles[name] = parameter.register_hook(functools.partial(self._see, name))

    def _see(self, name: str, gradient: Tensor) -> None:
        self._handles[name].remove()
        self._seen[name] = _digest(gradient)

    def check(self) -> None:
        """See that they agree, before the optimiser's first step; by all ranks together.

        Raises:
            NotImplementedError: they do not; the message names the parameters.
        """
        nothing = torch.zeros(2, dtype=torch.float32, device=self._model.device)
        found = {name: self._seen.get(name, nothing) for name in self._handles}
        for handle in self._handles.values():
            handle.remove()
        for name, parameter in self._model.named_parameters():
            gradient = parameter.grad
            if isinstance(gradient, DTensor) and not {"tp", "ep"} & set(gradient.device_mesh.mesh_dim_names or ()):
                found[name] = _digest(gradient.to_local())
        if not found:
            return
        own = torch.stack([digest.to(nothing.device) for digest in found.values()])
        everyones = [torch.empty_like(own) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(everyones, own, group=self._group)
        all_of = torch.stack(everyones)  # [ranks, parameters, 2]
        norms = all_of[..., 0].amax(0)
        apart = (all_of.amax(0) - all_of.amin(0)).amax(-1)
        flags = (apart > _ALLOWED * norms) & (norms > _NOISE * norms.max())
        # Ranks of other groups hold other parts of what FSDP shards.
        flags = flags.to(torch.uint8)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        if names := [name for name, flag in zip(found, flags.tolist(), strict=True) if flag]:
            raise NotImplementedError(
                f"{described(language_model(self._model))} is cut by tensor parallelism, and processes that have all "
                f"of {names[0]} ({len(names)} such) do not agree on its gradient: each sees a part of it, and the "
                "model's plan does not say so. Use FSDP2 instead, or do not train them (requires_grad)"
            )


def _digest(gradient: Tensor) -> Tensor:
    """[2]: its norm, and its product with numbers that are as large: float32."""
    values = gradient.detach().float().flatten()
    probe = torch.arange(len(values), device=values.device, dtype=torch.float32).mul(0.7).cos()
    return torch.stack([values.norm(), values @ probe])


def alike_gradients_of(model: Any) -> AlikeGradients | None:
    """For a model that tensor parallelism has cut; None for others."""
    lm = language_model(model)
    cut = getattr(lm, "is_distributed_loading_by_transformers", False) and lm.config.distributed_config.tp_size > 1
    return AlikeGradients(model) if cut else None
