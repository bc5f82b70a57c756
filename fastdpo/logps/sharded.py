"""Parameters that other ranks hold parts of: brought together, or refused with what to do instead."""

from __future__ import annotations

from torch import Tensor


def gathered(parameter: Tensor | None) -> Tensor | None:
    """A DTensor whole, in one collective; anything else as it is.

    The gradient goes back as the mean over the ranks, which is what FSDP2 gives to the parameters that it gathers
    itself; where every rank computes the same (tensor parallelism), it is that gradient. ``full_tensor`` by itself
    would keep of each rank's gradient the rank's own part, and never add the others'.
    """
    if not hasattr(parameter, "full_tensor"):
        return parameter
    from torch.distributed.tensor import Partial  # there, or no tensor could be one

    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def refuse_sharded(**inputs: Tensor | None) -> None:
    """TypeError if one is a DTensor: what belongs to tokens is each rank's own."""
    for name, value in inputs.items():
        if hasattr(value, "full_tensor"):
            raise TypeError(
                f"{name} is a DTensor ({value.placements}); it should be a plain tensor, of the tokens that this rank "
                f"scores: {name}.to_local() where it is sharded over tokens, {name}.full_tensor() where over anything "
                "else"
            )


def refuse_sharded_parts(**parameters: Tensor | None) -> None:
    """TypeError if one is a DTensor: a part of the vocabulary is a plain tensor."""
    for name, value in parameters.items():
        if hasattr(value, "full_tensor"):
            raise TypeError(
                f"{name} is a DTensor ({value.placements}), and group is given; it should be a plain tensor, this "
                f"rank's part of the vocabulary: {name}.to_local() where the placement is Shard(0) over group; or "
                "leave out group, and it is gathered"
            )


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
