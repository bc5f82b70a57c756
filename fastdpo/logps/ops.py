"""What stands between token_logps's arguments and the two ops: checks, layout, autocast, and the calls themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo.logps import device_paths as _device_paths  # noqa: F401  (loads the ops)
from fastdpo.logps.dense import refuse_not_dense
from fastdpo.logps.sharded import gathered, partitioned_by, refuse_sharded

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What may be asked for, and the op's output that it comes from.
OUTPUTS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logits",
    "is_top1": "top_gap",  # the distance of the greatest other logit from the target's
}


class OpInputs(NamedTuple):
    """The arguments that both ops share, checked, and in the ops' layout and dtype."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [N]
    bias: Tensor | None  # [V]
    scalars: dict[str, Any]


def op_inputs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    *,
    ignore_index: int,
    logit_scale: float,
    softcap: float | None,
    temperature: float,
    num_scored: int | None,
) -> OpInputs:
    """Arguments, result's values and errors as :func:`token_logps`'s; what is copied on the way is differentiable."""
    refuse_not_dense(hidden=hidden, weight=weight, targets=targets, bias=bias)
    refuse_sharded(hidden=hidden, targets=targets)
    hidden, weight = _autocast(hidden, weight)
    weight, bias = gathered(weight), gathered(bias)
    _check(hidden, weight, targets, bias, softcap, temperature, logit_scale, num_scored)
    scalars = {
        "ignore_index": ignore_index,
        "num_scored": -1 if num_scored is None else num_scored,
        "logit_scale": float(logit_scale),
        "softcap": 0.0 if softcap is None else float(softcap),
        "temperature": float(temperature),
    }
    return OpInputs(
        hidden.reshape(-1, hidden.shape[-1]).contiguous(),
        weight.contiguous(),
        targets.reshape(-1).contiguous(),
        None if bias is None else bias.contiguous(),
        scalars,
    )


def forward_op(
    inputs: OpInputs, *, need_direction: bool, retain_bytes: int, outputs: Sequence[str] = ()
) -> tuple[Tensor, ...]:
    """logps, row_state, direction, retained and the extra outputs, as csrc/fastdpo.h defines them."""
    *tensors, scalars = inputs
    try:
        results: tuple[Tensor, ...] = torch.ops.fastdpo.token_logps_forward(
            *tensors,
            **scalars,
            need_direction=need_direction,
            retain_bytes=retain_bytes,
            **{op_name: name in outputs for name, op_name in OUTPUTS.items()},
        )
        return results
    except RuntimeError as error:
        # The only kind of error that torch's stable ABI, through which the CUDA op goes, has.
        if "`targets`[" in str(error):
            raise IndexError(str(error)) from None
        raise


def named_outputs(values: Sequence[Tensor], names: Sequence[str], inputs: OpInputs) -> dict[str, Tensor]:
    """The fields ``names`` of :class:`fastdpo.TokenLogps`, [N] each, from the op's extra outputs."""
    fields = {name: value for name, value in zip(OUTPUTS, values, strict=True) if name in names}
    if "is_top1" in fields:
        fields["is_top1"] = (fields["is_top1"] <= 0) & (inputs.targets != inputs.scalars["ignore_index"])
    return fields


def backward_op(
    inputs: OpInputs,
    grad_logps: Tensor,
    state: Sequence[Tensor],
    *,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    weight_sum: Tensor | None = None,
    bias_sum: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, weight and bias, from the forward's ``state``: (row_state, direction, retained)."""
    *tensors, scalars = inputs
    gradients: tuple[Tensor, Tensor, Tensor] = torch.ops.fastdpo.token_logps_backward(
        grad_logps.contiguous(),  # a sum's is one number, expanded
        *tensors,
        *state,
        weight_sum,
        bias_sum,
        **scalars,
        need_hidden=need_hidden,
        need_weight=need_weight,
        need_bias=need_bias,
    )
    return gradients


def _autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Under autocast an output embedding runs in autocast's dtype; float64 stays what it is, as does the bias."""
    device = hidden.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return hidden, weight
    if torch.float64 in (hidden.dtype, weight.dtype):
        return hidden, weight
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype)


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    logit_scale: float,
    num_scored: int | None,
) -> None:
    """Everything but the targets' values, which the ops look at."""
    if hidden.dtype not in DTYPES:
        raise TypeError(f"hidden has dtype {hidden.dtype}; it should be one of {', '.join(map(str, DTYPES))}")
    if weight.dtype != hidden.dtype:
        raise TypeError(
            f"weight has dtype {weight.dtype}; it should be hidden's, {hidden.dtype}: cast one of them, or use autocast"
        )
    if targets.dtype != torch.int64:
        raise TypeError(f"targets has dtype {targets.dtype}; it should be torch.int64")
    if bias is not None and not bias.is_floating_point():
        raise TypeError(f"bias has dtype {bias.dtype}; it should be a floating dtype")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; it should be [V, H], both at least 1{partitioned_by(weight)}"
        )
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}; it should be [..., H] with H = {weight.shape[1]}, as weight"
        )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}; it should be hidden's without H, {tuple(hidden.shape[:-1])}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; it should be ({weight.shape[0]},), weight's rows")
    for name, tensor in (("weight", weight), ("targets", targets), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device}, hidden on {hidden.device}; they should be on one device")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it should be above 0")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it should be above 0, or None for none")
    if not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale is {logit_scale}; it should be finite")
    if num_scored is not None and not 0 <= num_scored <= targets.numel():
        raise ValueError(f"num_scored is {num_scored}; it should be in [0, {targets.numel()}], the size of targets")
