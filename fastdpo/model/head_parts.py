"""The part of an output embedding that this process has, where tensor parallelism has cut it over the vocabulary.

transformers' plans cut its rows (a ``DTensor``), and put around its forward one that brings the logits together. Ours
stands in that one's place: no logits are brought together, and the loss is told of the ranks that have the rest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch.distributed as dist
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard

HeadLayer = nn.Linear | LoraLinear


class HeadPart(NamedTuple):
    """What :func:`fastdpo.token_logps` is given of an output embedding.

    Attributes:
        weight: [V, H], or this rank's rows of it.
        bias: of as many entries, or None.
        group: the ranks that have a part each; None where the weight is whole.
    """

    weight: Tensor
    bias: Tensor | None
    group: dist.ProcessGroup | None = None


def is_of_a_plan(layer: nn.Module) -> bool:
    """Whether the layer's forward is what a plan of transformers put around its own, and its weight is cut by it."""
    around = getattr(vars(layer).get("forward"), "__module__", None) or ""
    return around.startswith("transformers.distributed.") and isinstance(getattr(layer, "weight", None), DTensor)


def part_of(head: HeadLayer, name: str) -> HeadPart:
    """The output embedding as it is inside of its own forward.

    Raises:
        NotImplementedError: it is cut otherwise than over the vocabulary; ``name`` is the model's.
    """
    weight, bias = head.weight, head.bias
    if not isinstance(weight, DTensor) and not isinstance(bias, DTensor):
        return HeadPart(weight, bias)
    placements = getattr(weight, "placements", None)
    if isinstance(weight, DTensor) and (bias is None or isinstance(bias, DTensor)) and weight.device_mesh.ndim == 1:
        of_bias = placements if bias is None else bias.placements
        if placements == of_bias == (Replicate(),):
            return HeadPart(weight.to_local(), None if bias is None else bias.to_local())
        if placements == of_bias == (Shard(0),):
            local = None if bias is None else bias.to_local()
            return HeadPart(weight.to_local(), local, weight.device_mesh.get_group())
    raise NotImplementedError(
        f"the output embedding of {name} is sharded ({placements}) inside its own forward, otherwise than by its "
        "vocabulary over the ranks of tensor parallelism. Leave it whole, or have its plan be colwise_gather_output"
    )
