"""Parameters that other ranks hold parts of: brought together, or refused with what to do instead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard, TypeVar

from torch import Tensor

MaybeTensor = TypeVar("MaybeTensor", bound="Tensor | None")


def gathered(parameter: MaybeTensor) -> MaybeTensor:
    """A DTensor whole, in one collective; anything else as it is.

    The gradient goes back as the mean over the ranks, which is what FSDP2 gives to the parameters that it gathers
    itself; where every rank computes the same (tensor parallelism), it is that gradient. ``full_tensor`` by itself
    would keep of each rank's gradient the rank's own part, and never add the others'.
    """
    if not _is_dtensor(parameter):
        return parameter
    from torch.distributed.tensor import Partial  # there, or no tensor could be one

    whole: MaybeTensor = parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)
    return whole


def refuse_sharded(**inputs: Tensor | None) -> None:
    """TypeError if one is a DTensor: what belongs to tokens is each rank's own."""
    for name, placements in _sharded(inputs):
        raise TypeError(
            f"{name} is a DTensor ({placements}); it should be a plain tensor, of the tokens that this rank scores: "
            f"{name}.to_local() where it is sharded over tokens, {name}.full_tensor() where over anything else"
        )


def refuse_sharded_parts(**parameters: Tensor | None) -> None:
    """TypeError if one is a DTensor: a part of the vocabulary is a plain tensor."""
    for name, placements in _sharded(parameters):
        raise TypeError(
            f"{name} is a DTensor ({placements}), and group is given; it should be a plain tensor, this rank's part of "
            f"the vocabulary: {name}.to_local() where the placement is Shard(0) over group; or leave out group, and it "
            "is gathered"
        )


def _sharded(tensors: dict[str, Tensor | None]) -> Iterator[tuple[str, Any]]:
    """Names and placements of those that are DTensors."""
    for name, value in tensors.items():
        if _is_dtensor(value):
            yield name, value.placements


def _is_dtensor(value: Tensor | None) -> TypeGuard[Any]:
    """Without an import of DTensor's module, which whoever has none need not wait for."""
    return hasattr(value, "full_tensor")


def partitioned_by(parameter: Tensor) -> str:
    """What leaves a parameter without its entries outside of its module's forward, as the end of an error message."""
    if hasattr(parameter, "ds_id"):
        return (
            ". DeepSpeed ZeRO-3 has partitioned it: compute the loss in the forward of the model that DeepSpeed wraps, "
            "as fastdpo.model.FusedHead does; or have it gathered by deepspeed.zero.GatheredParameters around the loss "
            "and its backward, both"
        )
    if hasattr(parameter, "_fsdp_flattened"):
        return (
            ". FullyShardedDataParallel has flattened and sharded it: compute the loss in the forward of the model "
            "that it wraps, as fastdpo.model.FusedHead does; or use fully_shard, whose parameters are gathered here"
        )
    return ""
