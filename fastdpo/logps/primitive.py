"""token_logps: log-probabilities of targets from hidden states and the output embedding, without their logits.

The one differentiable primitive: every loss of the family is a function of what it returns. The arithmetic stands in
csrc/fastdpo.h; this file connects the ops to autograd, and chooses who does for an output embedding that is not one
tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastdpo.logps.derivatives import first_derivative, refuse_forward_mode
from fastdpo.logps.low_rank import LowRankUpdate, low_rank_logps
from fastdpo.logps.ops import OUTPUTS, OpInputs, backward_op, forward_op, named_outputs, op_inputs
from fastdpo.logps.out_of_memory import in_less_memory
from fastdpo.logps.outputs import TokenLogps
from fastdpo.logps.sharded import refuse_sharded_parts
from fastdpo.logps.vocab_parallel import vocab_parallel_logps

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
    low_rank: LowRankUpdate | Sequence[LowRankUpdate] = (),
    group: dist.ProcessGroup | None = None,
) -> TokenLogps:
    """log p(targets), p = softmax(z), z = softcap * tanh(logit_scale * (hidden.weight + bias) / softcap) / temperature.

    Differentiable once, in hidden, weight and bias; what needs no gradient costs no work. The logits are float32
    whatever the inputs (float64 for float64) and never all in memory. Where weight has entries beyond 4e24 / V in size,
    hidden's gradient may overflow float32 on the way, and is then infinite or NaN, never another finite number.

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
        num_scored: the number of targets that are not ``ignore_index``, where the caller knows it: it saves the host's
            waiting for a device. A wrong number raises on the CPU and gives NaN on a device.
        low_rank: what is added to ``weight``, as products of small matrices that are never multiplied out: LoRA on
            the output embedding. See :class:`fastdpo.LowRankUpdate`.
        group: the ranks over which the vocabulary is cut. ``weight`` and ``bias`` are then this rank's part of it, as
            plain tensors: the first rank has the first entries, and so on; parts need not be of one size. Everything
            else is the same on every rank, also what requires a gradient, and so are the results: ``targets`` count
            through the whole vocabulary, and every rank goes on to the same loss and calls backward. The gradients of
            weight and bias are those of the rank's part; hidden's is the whole, summed over the ranks in the backward
            (one number of the compute type for each of a scored token's H; in the forward, 16 bytes a scored token,
            and 8 to 16 for each of ``outputs``).

    Under torch.compile a call with ``low_rank`` or ``group`` is left to eager mode, at a graph break.

    Returns:
        :class:`fastdpo.TokenLogps`, fields of targets' shape.

    Raises:
        TypeError, ValueError: an argument's dtype, shape, device or range, by name.
        IndexError: a target outside [0, V). (On a device with num_scored given, and in a captured graph, that row is
            NaN.)
        NotImplementedError: a second derivative, forward-mode differentiation, or vmap; both low_rank and group.
        RuntimeError: low_rank or group in a captured CUDA graph, without num_scored.
        torch.OutOfMemoryError: memory did not suffice, with half of ``retain_bytes`` either (which is tried, with a
            warning, unless there is a ``group``).
    """
    unknown = [name for name in outputs if name not in OUTPUTS]
    if unknown:
        raise ValueError(f"outputs names {', '.join(map(repr, unknown))}; it may name {', '.join(OUTPUTS)}")
    if retain_bytes < 0:
        raise ValueError(f"retain_bytes is {retain_bytes}; it should be at least 0")
    vocabulary = vocabulary_of(weight, bias, low_rank, group)
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

    def compute(room: int) -> tuple[Tensor, ...]:
        return differentiable_logps(inputs, room, outputs, vocabulary)

    if group is None:
        logps, *extras = in_less_memory(compute, retain_bytes, "retain_bytes", inputs)
    else:  # a rank that tries again would leave the others waiting
        logps, *extras = compute(retain_bytes)
    fields = named_outputs(extras, outputs, inputs)
    return TokenLogps(logps.view(targets.shape), **{name: x.view(targets.shape) for name, x in fields.items()})


class Vocabulary(NamedTuple):
    """What the output embedding is made of beside the weight and the bias that are at hand."""

    updates: tuple[LowRankUpdate, ...] = ()
    group: dist.ProcessGroup | None = None

    @property
    def is_here(self) -> bool:
        """Whether weight and bias are all there is."""
        return not self.updates and self.group is None


def vocabulary_of(
    weight: Tensor,
    bias: Tensor | None,
    low_rank: LowRankUpdate | Sequence[LowRankUpdate],
    group: dist.ProcessGroup | None,
) -> Vocabulary:
    """From :func:`token_logps`'s arguments; raises where they do not go together."""
    updates = (low_rank,) if isinstance(low_rank, LowRankUpdate) else tuple(low_rank)
    if updates and group is not None:
        raise NotImplementedError("low_rank and group are both given; a sharded vocabulary takes no low-rank update")
    if group is not None:
        refuse_sharded_parts(weight=weight, bias=bias)
    return Vocabulary(updates, group)


def differentiable_logps(
    inputs: OpInputs, retain_bytes: int, outputs: Sequence[str] = (), vocabulary: Vocabulary | None = None
) -> tuple[Tensor, ...]:
    """The log-probabilities [N], connected to autograd, and the op's extra outputs, with ``outputs`` among them."""
    if vocabulary is not None and vocabulary.updates:
        return low_rank_logps(inputs, vocabulary.updates, retain_bytes, outputs)
    if vocabulary is not None and vocabulary.group is not None:
        return vocab_parallel_logps(inputs, vocabulary.group, retain_bytes, outputs)
    hidden, weight, targets, bias, scalars = inputs
    grad = torch.is_grad_enabled()
    need_grads = [grad and x is not None and x.requires_grad for x in (hidden, weight, bias)]
    function = _TokenLogps if torch.compiler.is_compiling() else _EagerTokenLogps
    logps, _, _, _, *extras = function.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, bias, need_grads, scalars, retain_bytes, tuple(outputs)
    )
    return logps, *extras


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
