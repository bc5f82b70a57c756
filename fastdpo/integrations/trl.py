"""TRL's trainers over our kernels: ``enable()`` puts ``token_logps`` where TRL's fused LM head has its own function.

    import fastdpo.integrations.trl

    fastdpo.integrations.trl.enable()

Everything else of a run stays TRL's: trainers, losses, metrics, checkpoints. Models whose trainer was made before
``enable()`` use it as well, since TRL looks its function up at every call; only the labels that are scored reach the
kernels, on every device.

Covered, as they score through TRL's fused LM head (``trl.trainer.utils.add_fused_lm_head``), policy and reference:

- ``DPOTrainer``: every loss type, WPO weights, LD-DPO, f-divergences, PEFT, precomputed references
- ``KTOTrainer``, ``RLOOTrainer``
- ``SFTTrainer`` (nll and dft), but for a ``compute_loss_func`` or label smoothing, which take full logits
- ``GRPOTrainer``, but for the entropy bonus: see below
- ``trl.experimental``: ``async_grpo``, ``gmpo``, ``bema_for_ref_model``'s ``DPOTrainer``, and ``kto``, an alias

Not covered, and left as they are:

- full logits of their own: ``trl.experimental`` ``orpo``, ``cpo``, ``tpo``, ``online_dpo``, ``a2po``, ``sdpo``,
  ``sdft``, ``iw_opd``, ``gkd``, ``gold``, ``server_distillation``; what a deprecated ``compute_metrics`` asks of any
  trainer; and models called without ``fused_lm_head=True``
- a divergence between two models' distributions, which is not a log-probability: ``DistillationTrainer``,
  ``trl.experimental`` ``async_distillation``
- no output embedding at all: ``RewardTrainer``
- ``trl.kernels.ChunkedLogProbFunction`` called by your own code

What is different from TRL's own numbers:

- Logits are float32 accumulators. TRL rounds them to the inputs' type, so that in bfloat16 and float16 its
  log-probabilities carry that error and ours do not.
- The entropy is for logging. A gradient into it raises NotImplementedError: in ``GRPOTrainer`` with ``entropy_coef``
  other than 0, and with ``use_adaptive_entropy`` as soon as its bonus sets in. No other trainer differentiates it.
- ``is_top1`` is whether no other logit is greater than the label's. On a tie TRL counts the first entry alone.
- Where weight and hidden states have different types (``cast_lm_head_to_fp32``, autocast), the weight is cast whole,
  and kept until the backward; TRL casts it piece by piece, twice.
- A label outside the vocabulary raises IndexError on the CPU and is NaN on CUDA.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastdpo import logps
from fastdpo.logps.graphs import outside_of_graphs

SUPPORTED_VERSION = "1.16"

# How TRL calls what we replace.
_PARAMETERS = [
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
]

# TRL's own attributes while ours are in their place.
_originals: dict[str, Any] = {}


def enable() -> None:
    """Have TRL's fused LM head use :func:`fastdpo.token_logps`, until :func:`disable`. Twice is as once.

    Raises:
        ImportError: TRL is not installed.
        RuntimeError: TRL's version is not the one whose internals this replaces, or they are not as expected.
    """
    if _originals:
        return
    utils = _checked_utils()
    _originals.update({name: getattr(utils, name) for name in _REPLACEMENTS})
    _put(utils, _REPLACEMENTS)


def disable() -> None:
    """Give TRL its own function back. Does nothing where :func:`enable` was not called."""
    if _originals:
        _put(_utils(), _originals)
        _originals.clear()


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """:func:`enable` for a ``with`` block; afterwards all is as it was before the block."""
    was_enabled = bool(_originals)
    enable()
    try:
        yield
    finally:
        if not was_enabled:
            disable()


def _utils() -> ModuleType:
    from trl.trainer import utils

    return utils


def _put(utils: ModuleType, attributes: dict[str, Any]) -> None:
    for name, value in attributes.items():
        setattr(utils, name, value)


def _checked_utils() -> ModuleType:
    """TRL's module, if it is the one that we know."""
    try:
        import trl
    except ImportError as error:
        raise ImportError(
            f"fastdpo.integrations.trl needs TRL, which is not installed: pip install 'trl=={SUPPORTED_VERSION}.*'"
        ) from error
    if trl.__version__.split(".")[:2] != SUPPORTED_VERSION.split("."):
        raise RuntimeError(
            f"TRL {trl.__version__} is installed; fastdpo.integrations.trl replaces internals of TRL and is made for "
            f"{SUPPORTED_VERSION}: pip install 'trl=={SUPPORTED_VERSION}.*', or train without enable()"
        )
    utils = _utils()
    missing = [name for name in (*_REPLACEMENTS, "maybe_gather_lm_head_ctx") if not hasattr(utils, name)]
    if missing:
        raise RuntimeError(
            f"TRL {trl.__version__} has no {' and no '.join(missing)} in trl.trainer.utils, which "
            "fastdpo.integrations.trl builds on; train without enable()"
        )
    parameters = list(inspect.signature(utils._ChunkedLogProbFunction.forward).parameters)[1:]  # the first is ctx
    if parameters != _PARAMETERS:
        raise RuntimeError(
            f"TRL {trl.__version__} calls its log-probability function with ({', '.join(parameters)}); "
            f"fastdpo.integrations.trl expects ({', '.join(_PARAMETERS)}); train without enable()"
        )
    return utils


class _TokenLogpsFunction:
    """Called as TRL's ChunkedLogProbFunction, with the same results in the same order."""

    @staticmethod
    def apply(
        hidden: Tensor,  # [N, H]
        weight: Tensor,  # [V, H]
        bias: Tensor | None,  # [V]
        targets: Tensor,  # [N], all of them scored
        temperature: float,
        chunk_size: int,  # of TRL's tiles; our kernels choose their own
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Iterable[str] = logps.OUTPUTS,
    ) -> tuple[Tensor | None, ...]:
        with _regathered_in_backward(weight, bias):
            result = logps.token_logps(
                hidden,
                weight.to(hidden.dtype),
                targets,
                bias,
                temperature=temperature,
                softcap=final_logit_softcapping,
                logit_scale=logit_scale,
                outputs=[name for name in outputs if name != "log_probs"],
                num_scored=targets.numel(),
            )
        log_probs = result.logps.float()
        entropy = None if result.entropy is None else _entropy_for_logging(result.entropy.float(), log_probs)
        return (
            log_probs,
            entropy,
            None if result.log_sum_sq_probs is None else result.log_sum_sq_probs.float(),
            None if result.mean_logits is None else result.mean_logits.float(),
            result.is_top1,
        )


def _scores_labels_only(device: torch.device) -> bool:
    """Stands for TRL's _use_triton, which its head asks whether to leave ignored positions out: on every device."""
    return True


_REPLACEMENTS = {"_ChunkedLogProbFunction": _TokenLogpsFunction, "_use_triton": _scores_labels_only}


@contextlib.contextmanager
def _regathered_in_backward(weight: Tensor, bias: Tensor | None) -> Iterator[None]:
    """Under DeepSpeed ZeRO-3 TRL gathers the head for the forward alone: have it gathered again for the backward.

    What autograd saves of a parameter is the parameter, which by then is empty. A cast copy is not, and is left alone.
    """
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        yield
        return
    gathered = [parameter for parameter in (weight, bias) if parameter is not None]

    def pack(tensor: Tensor) -> Tensor | int:
        same = (i for i, x in enumerate(gathered) if x.data_ptr() == tensor.data_ptr() and x.shape == tensor.shape)
        return next(same, tensor)

    def unpack(packed: Tensor | int) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        parameter = gathered[packed]
        with _utils().maybe_gather_lm_head_ctx(parameter):
            return parameter.detach().clone()  # outside of the context the memory is DeepSpeed's again

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


class _EntropyForLogging(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, entropy: Tensor, log_probs: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return entropy.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_entropy: Tensor | None) -> tuple[None, None]:
        # Who wraps all of a model's outputs sends none (DDP with a static graph) or zeros (torch.compile): no gradient.
        if grad_entropy is not None and bool(grad_entropy.any()):
            raise NotImplementedError(
                "the loss has a gradient into the entropy, which fastdpo computes for logging only: train without "
                "fastdpo.integrations.trl.enable(), or without an entropy bonus (GRPO: entropy_coef=0.0 and "
                "use_adaptive_entropy=False)"
            )
        return None, None


@outside_of_graphs("tracing would run into what the backward raises")
def _entropy_for_logging(entropy: Tensor, log_probs: Tensor) -> Tensor:
    """The entropy, connected to the log-probabilities' inputs, so that a gradient into it is not lost in silence."""
    connected: Tensor = _EntropyForLogging.apply(entropy, log_probs)  # type: ignore[no-untyped-call]
    return connected
