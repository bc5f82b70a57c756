"""token_logps: log-probabilities of targets from hidden states and the output embedding, without their logits.

The one differentiable primitive: every loss of the family is a function of what it returns. The arithmetic stands in
csrc/fastdpo.h; this file checks arguments, brings them to the ops' layout, and connects the ops to autograd.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdpo import _native  # noqa: F401  (loads the ops)
from fastdpo.derivatives import first_derivative, refuse_forward_mode
from fastdpo.outputs import TokenLogps
from fastdpo.sharded import gathered, partitioned_by, refuse_sharded

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What may be asked for, and the op's output that it comes from.
OUTPUTS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "log_sum_sq_probs",
    "mean_logits": "mean_logits",
    "is_top1": "top_gap",  # the distance of the greatest other logit from the target's
}
DEFAULT_RETAIN_BYTES = 256 << 20


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    outputs: Sequence[str] = (),
    retain_bytes: int = DEFAULT_RETAIN_BYTES,
    num_scored: int | None = None,
) -> TokenLogps:
    """log p(targets), p = softmax(z), z = softcap * tanh(logit_scale * (hidden.weight + bias) / softcap) / temperature.

    Differentiable once, in hidden, weight and bias; what needs no gradient costs no work. The logits are float32
    whatever the inputs (float64 for float64) and never all in memory.

    Args:
        hidden: [..., H], float32, bfloat16, float16 or float64.
        weight: [V, H], the output embedding, of hidden's dtype (under autocast both are cast to its dtype). A DTensor
            (as of FSDP2) is gathered, once, and its gradient is the mean over the ranks, as FSDP2's own are.
        targets: [...] int64; targets[...] in [0, V), or ``ignore_index``.
        bias: [V], of a floating dtype; gathered as weight is.
        ignore_index: the target of positions that are not scored: log-probability 0, no gradient, no work.
        logit_scale: factor on the products (Cohere's logit_scale, 1 / Granite's logits_scaling, …).
        softcap: bound of the logits' tanh (Gemma 2's final_logit_softcapping), above 0; None for none.
        temperature: divisor of the logits, above 0.
        outputs: any of ``entropy``, ``log_sum_sq_probs``, ``mean_logits``, ``is_top1``; detached, from the same pass.
        retain_bytes: how much memory exponentials may take up from forward to backward when weight or bias needs a
            gradient; tokens beyond it cost one more matrix product in the backward.
        num_scored: the number of targets that are not ``ignore_index``, where the caller knows it: on CUDA it saves
            the host's waiting for the device. A wrong number raises on the CPU and gives NaN on CUDA.

    Returns:
        :class:`fastdpo.TokenLogps`, fields of targets' shape.

    Raises:
        TypeError, ValueError: an argument's dtype, shape, device or range, by name.
        IndexError: a target outside [0, V). (On CUDA with num_scored given, and in a captured graph, that row is NaN.)
        NotImplementedError: a second derivative, forward-mode differentiation, or vmap.
    """
    unknown = [name for name in outputs if name not in OUTPUTS]
    if unknown:
        raise ValueError(f"outputs names {', '.join(map(repr, unknown))}; it may name {', '.join(OUTPUTS)}")
    if retain_bytes < 0:
        raise ValueError(f"retain_bytes is {retain_bytes}; it should be at least 0")
    inputs = op_inputs(
        hidden,
        weight,
        targets,
        bias,
        ignore_index=ignore_index,
        logit_scale=logit_scale,
        softcap=softcap,
        temperature=temperature,
        num_scored=num_scored,
    )
    logps, *extras = differentiable_logps(inputs, retain_bytes, outputs)
    fields = named_outputs(extras, outputs, inputs)
    return TokenLogps(logps.view(targets.shape), **{name: x.view(targets.shape) for name, x in fields.items()})


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


def differentiable_logps(inputs: OpInputs, retain_bytes: int, outputs: Sequence[str] = ()) -> tuple[Tensor, ...]:
    """The log-probabilities [N], connected to autograd, and the op's extra outputs, with ``outputs`` among them."""
    hidden, weight, targets, bias, scalars = inputs
    grad = torch.is_grad_enabled()
    need_grads = [grad and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    function = _TokenLogps if torch.compiler.is_compiling() else _EagerTokenLogps
    logps, _, _, _, *extras = function.apply(
        hidden, weight, targets, bias, need_grads, scalars, retain_bytes, tuple(outputs)
    )
    return logps, *extras


def forward_op(
    inputs: OpInputs, *, need_direction: bool, retain_bytes: int, outputs: Sequence[str] = ()
) -> tuple[Tensor, ...]:
    """logps, row_state, direction, retained and the extra outputs, as csrc/fastdpo.h defines them."""
    *tensors, scalars = inputs
    return torch.ops.fastdpo.token_logps_forward(
        *tensors,
        **scalars,
        need_direction=need_direction,
        retain_bytes=retain_bytes,
        **{op_name: name in outputs for name, op_name in OUTPUTS.items()},
    )


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
    return torch.ops.fastdpo.token_logps_backward(
        grad_logps,
        *tensors,
        *state,
        weight_sum,
        bias_sum,
        **scalars,
        need_hidden=need_hidden,
        need_weight=need_weight,
        need_bias=need_bias,
    )


class _TokenLogps(torch.autograd.Function):
    # What the backward needs is among the outputs: torch.func sees what a Function returns, not what it keeps aside.
    @staticmethod
    def forward(
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        need_grads: Sequence[bool],
        scalars: dict[str, Any],
        retain_bytes: int,
        outputs: tuple[str, ...],
    ) -> tuple[Tensor, ...]:
        need_hidden, need_weight, need_bias = need_grads
        return forward_op(
            OpInputs(hidden, weight, targets, bias, scalars),
            need_direction=need_hidden,
            retain_bytes=retain_bytes if need_weight or need_bias else 0,
            outputs=outputs,
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        hidden, weight, targets, bias, ctx.need_grads, ctx.scalars, *_ = inputs
        row_state, direction, retained, *_ = output[1:]
        ctx.save_for_backward(hidden, weight, targets, bias, row_state, direction, retained)
        ctx.mark_non_differentiable(*output[1:])
        if not torch.compiler.is_compiling():
            ctx.set_materialize_grads(False)  # or each output would get a gradient of zeros, as large as itself

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_logps is None:
            return (None,) * 8
        compute = partial(_gradients, ctx.need_grads, ctx.scalars)
        grad_hidden, grad_weight, grad_bias = first_derivative(compute, grad_logps, *ctx.saved_tensors)
        return grad_hidden, grad_weight, None, grad_bias, *(None,) * 4

    @staticmethod
    def vmap(info: Any, in_dims: Any, *_: Any) -> None:
        raise NotImplementedError(
            "token_logps and dpo_loss cannot be vmapped. token_logps need not be: it takes hidden [..., H] and targets "
            "[...] with any leading dimensions at once; for losses or gradients of single examples, loop over them"
        )


class _EagerTokenLogps(_TokenLogps):
    # torch.compile takes no Function that defines it.
    jvp = staticmethod(refuse_forward_mode)


def _gradients(
    need_grads: Sequence[bool],
    scalars: dict[str, Any],
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    *state: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of hidden, weight and bias; None for what needs none."""
    need_hidden, need_weight, need_bias = need_grads
    gradients = backward_op(
        OpInputs(hidden, weight, targets, bias, scalars),
        grad_logps,
        state,
        need_hidden=need_hidden,
        need_weight=need_weight,
        need_bias=need_bias,
    )
    return tuple(gradient if need else None for gradient, need in zip(gradients, need_grads, strict=True))


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
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; it should be [V, H] with V of at least 1{partitioned_by(weight)}"
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
    if hidden.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"hidden is on {hidden.device}; fastdpo has kernels for cpu and cuda")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it should be above 0")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it should be above 0, or None for none")
    if not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale is {logit_scale}; it should be finite")
    if num_scored is not None and not 0 <= num_scored <= targets.numel():
        raise ValueError(f"num_scored is {num_scored}; it should be in [0, {targets.numel()}], the size of targets")
