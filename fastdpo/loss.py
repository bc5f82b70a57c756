"""Preference losses: short functions of log-probabilities, and the entry points that compute them from hidden states.

``preference_loss`` is for callers who have sequence log-probabilities, ``dpo_loss`` and its module ``DPOLoss`` for
those who have hidden states and the output embedding. Notation: B pairs; a log-ratio is log pi(y|x) - log pi_ref(y|x),
in nats; rewards are beta times it (Rafailov et al. 2023, arXiv 2305.18290, eq. 5).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdpo._native import compute_dtype
from fastdpo.groups import grouped_loss, plan_of, row_bytes
from fastdpo.logps import DEFAULT_RETAIN_BYTES, differentiable_logps, op_inputs, token_logps
from fastdpo.outputs import DPOOutput


def _sigmoid(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """DPO (arXiv 2305.18290, eq. 7); with label_smoothing > 0 conservative DPO, for labels flipped with that chance."""
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def _ipo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17), beta for the paper's tau."""
    return (chosen - rejected - 1 / (2 * beta)).square()


def _hinge(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """The hinge of SLiC-HF (Zhao et al. 2023, arXiv 2305.10425, eq. 1) on DPO's rewards, with margin 1."""
    return F.relu(1 - beta * (chosen - rejected))


# Each takes the log-ratios [B] of chosen and rejected and returns losses [B], a pair's from its own log-ratios alone:
# dpo_loss computes them a group of pairs at a time. A loss that couples pairs would have to see the whole batch, and so
# to go where dpo_loss has one group.
LOSSES: dict[str, Callable[..., Tensor]] = {"sigmoid": _sigmoid, "ipo": _ipo, "hinge": _hinge}

# Options that only some losses define. Any other loss refuses them, so that none is dropped in silence.
_OPTIONS_OF: dict[str, tuple[str, ...]] = {"sigmoid": ("label_smoothing",), "ipo": ("ipo_reduction",), "hinge": ()}
_IPO_REDUCTIONS = ("mean", "sum")


def check_loss_options(loss_type: str, beta: float, label_smoothing: float, ipo_reduction: str | None) -> None:
    """Raises ValueError, naming the argument, what it was and what it should be, unless the options fit the loss."""
    if loss_type not in LOSSES:
        raise ValueError(f"loss_type is {loss_type!r}; it should be one of {', '.join(LOSSES)}")
    if not beta > 0:
        raise ValueError(f"beta is {beta}; it should be above 0 (0.1 is usual)")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; it should be at least 0 and below 0.5")
    if ipo_reduction not in (None, *_IPO_REDUCTIONS):
        raise ValueError(f"ipo_reduction is {ipo_reduction!r}; it should be one of {', '.join(_IPO_REDUCTIONS)}")
    given = {"label_smoothing": label_smoothing != 0, "ipo_reduction": ipo_reduction is not None}
    for option, is_given in given.items():
        if is_given and option not in _OPTIONS_OF[loss_type]:
            defined = ", ".join(_OPTIONS_OF[loss_type]) or "no options"
            raise ValueError(f"loss_type {loss_type!r} does not define {option}; it defines {defined}")


def preference_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor | None,
    reference_rejected_logps: Tensor | None,
    beta: float,
    label_smoothing: float = 0.0,
    ipo: bool = False,
    reference_free: bool = False,
    *,
    loss_type: str | None = None,
    ipo_reduction: str | None = None,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and rewards of B pairs from sequence log-probabilities.

    The positional arguments, their order and the result are those of the DPO authors' ``preference_loss``.

    Args:
        policy_chosen_logps, policy_rejected_logps: [B] float, sums of log pi(token) over each completion, in nats.
        reference_chosen_logps, reference_rejected_logps: [B], the same under the reference model; not used, and may
            be None, with ``reference_free``.
        beta: strength of the KL constraint, above 0.
        label_smoothing: ``sigmoid`` only: the chance that a label is flipped (cDPO), in [0, 0.5).
        ipo: the DPO authors' switch: ``loss_type="ipo"`` on sums, as their implementation computes it.
        reference_free: take the reference's log-probabilities as 0.
        loss_type: ``sigmoid`` (default), ``ipo`` or ``hinge``.
        ipo_reduction: ``ipo`` only: ``mean`` (default) takes log-ratios per token, as TRL does and as IPO's authors
            confirmed to be meant; it needs the lengths. ``sum`` takes whole sequences, as the DPO authors' code does.
        chosen_lengths, rejected_lengths: [B], numbers of scored tokens; needed by ``ipo`` on means alone.

    Returns:
        (losses, chosen_rewards, rejected_rewards), each [B]; the rewards are detached.

    Raises:
        ValueError: an option out of range, or one that the loss does not define; a missing or misshapen tensor.
    """
    if ipo:
        if loss_type not in (None, "ipo") or ipo_reduction not in (None, "sum"):
            raise ValueError(
                f"ipo=True means loss_type='ipo' with ipo_reduction='sum'; got loss_type={loss_type!r} and "
                f"ipo_reduction={ipo_reduction!r}: leave one or the other out"
            )
        loss_type, ipo_reduction = "ipo", "sum"
    loss_type = loss_type or "sigmoid"
    check_loss_options(loss_type, beta, label_smoothing, ipo_reduction)

    logps = {"policy_chosen_logps": policy_chosen_logps, "policy_rejected_logps": policy_rejected_logps}
    if not reference_free:
        logps["reference_chosen_logps"] = reference_chosen_logps
        logps["reference_rejected_logps"] = reference_rejected_logps
    for name, value in logps.items():
        if value is None:
            raise ValueError(f"{name} is None; give a tensor, or reference_free=True to go without a reference")
        if value.shape != policy_chosen_logps.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; it should be that of policy_chosen_logps, "
                f"{tuple(policy_chosen_logps.shape)}"
            )
    if reference_free:
        chosen, rejected = policy_chosen_logps, policy_rejected_logps
    else:
        chosen = policy_chosen_logps - reference_chosen_logps
        rejected = policy_rejected_logps - reference_rejected_logps

    if loss_type == "ipo" and ipo_reduction != "sum":
        if chosen_lengths is None or rejected_lengths is None:
            raise ValueError(
                "loss_type 'ipo' takes means over tokens: give chosen_lengths and rejected_lengths, or "
                "ipo_reduction='sum'"
            )
        losses = _ipo(chosen / chosen_lengths, rejected / rejected_lengths, beta)
    elif loss_type == "sigmoid":
        losses = _sigmoid(chosen, rejected, beta, label_smoothing)
    else:
        losses = LOSSES[loss_type](chosen, rejected, beta)
    return losses, beta * chosen.detach(), beta * rejected.detach()


def dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_logps: Tensor | None = None,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    ipo_reduction: str | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    workspace: int | None = None,
) -> DPOOutput:
    """The preference loss of B pairs from hidden states, without their logits in memory.

    The reference is given as hidden states (``ref_hidden``, with ``ref_weight`` and ``ref_bias`` where its output
    embedding is another one), or as log-probabilities (``ref_logps``), or not at all (reference-free).

    Args:
        hidden: [2B, T, H], the B chosen rows first, then the B rejected ones in the same order; or, with
            ``cu_seqlens``, [N, H]: 2B sequences one after another, the chosen ones first. float32, bfloat16, float16
            or float64.
        weight: [V, H], the output embedding.
        targets: [2B, T] or [N] int64, already shifted: targets[t] is what hidden[t] predicts. ``ignore_index`` where
            nothing is scored (prompt, padding).
        ref_hidden: as ``hidden`` (its H may differ with ``ref_weight``), from the reference model. No gradient.
        ref_weight, ref_bias: [V, H_ref] and [V]; by default ``weight`` and ``bias``, without their gradient.
        ref_logps: [2B], the reference's log-probabilities summed over each completion, in nats.
        bias: [V].
        cu_seqlens: [2B + 1] int64 or int32, the packed sequences' bounds: 0, …, N.
        beta, loss_type, label_smoothing, ipo_reduction: as in :func:`preference_loss`.
        ignore_index, logit_scale, softcap, temperature: as in :func:`fastdpo.token_logps`.
        workspace: bytes that may be spent on computing less where ``weight`` (or ``bias``) needs a gradient; 0 will do.
            A token whose exponentials are kept until its pair's loss is known costs 3 products of H x V, any other 4.
            They take up V numbers of hidden's dtype (float32 for float16). A batch of more tokens than that holds is
            taken in groups of at least some 512 tokens, one after another in the same memory. Their gradients of
            ``weight`` are summed in float32, and the sum for a 16-bit weight, 4 V H bytes, counts too: less room than
            that makes one group. (4 V H + 2000 V has room for groups of 1,000 tokens in bfloat16.) Default: 256 MiB.
            It changes nothing where ``hidden`` alone needs a gradient: 2 products, and N x H numbers of memory.

    Returns:
        :class:`fastdpo.DPOOutput`. Where policy and reference agree, the sigmoid loss is ln 2 and every reward is 0.
        Differentiable once, in hidden, weight and bias, and through ``loss`` alone.

    Raises:
        TypeError, ValueError, IndexError: naming the argument, what it was and what it should be; among them a
            completion in which nothing is scored.
    """
    check_loss_options(loss_type, beta, label_smoothing, ipo_reduction)
    if workspace is None:
        workspace = DEFAULT_RETAIN_BYTES
    if workspace < 0:
        raise ValueError(f"workspace is {workspace}; it should be at least 0")
    if ref_logps is not None and (ref_hidden is not None or ref_weight is not None or ref_bias is not None):
        raise ValueError("ref_logps already is the reference: leave out ref_hidden, ref_weight and ref_bias")
    if ref_hidden is None and (ref_weight is not None or ref_bias is not None):
        raise ValueError("ref_weight and ref_bias belong to ref_hidden, which is None")
    _check_layout(hidden, targets, cu_seqlens, ignore_index)
    if ref_hidden is not None and ref_hidden.shape[:-1] != hidden.shape[:-1]:
        raise ValueError(
            f"ref_hidden has shape {tuple(ref_hidden.shape)}; all but its last size should be those of hidden, "
            f"{tuple(hidden.shape)}"
        )

    tokens = _sum_sequences((targets != ignore_index).to(torch.int64), cu_seqlens)
    if ref_logps is not None and ref_logps.shape != tokens.shape:
        raise ValueError(
            f"ref_logps has shape {tuple(ref_logps.shape)}; it should be ({tokens.numel()},): one a completion"
        )
    counts = None if _must_not_wait(hidden) else _count_scored(tokens, ignore_index)
    options = {
        "ignore_index": ignore_index,
        "logit_scale": logit_scale,
        "softcap": softcap,
        "temperature": temperature,
        "num_scored": None if counts is None else sum(counts),
    }
    inputs = op_inputs(hidden, weight, targets, bias, **options)
    if ref_hidden is not None:
        if ref_weight is None:
            ref_weight, ref_bias = weight, bias if ref_bias is None else ref_bias
        with torch.no_grad():
            ref_token_logps = token_logps(ref_hidden, ref_weight, targets, ref_bias, **options).logps
            ref_logps = _sum_sequences(ref_token_logps, cu_seqlens)

    pairs = tokens.shape[0] // 2
    chosen_tokens, rejected_tokens = tokens.chunk(2)
    ref_chosen_logps, ref_rejected_logps = (None, None) if ref_logps is None else ref_logps.detach().chunk(2)

    def of_pairs(logps: Tensor, first: int = 0, last: int = pairs) -> tuple[Tensor, Tensor, Tensor]:
        """preference_loss of the pairs [first, last), whose sequences' log-probabilities are ``logps``."""
        return preference_loss(
            *logps.chunk(2),
            None if ref_logps is None else ref_chosen_logps[first:last],
            None if ref_logps is None else ref_rejected_logps[first:last],
            beta,
            label_smoothing,
            reference_free=ref_logps is None,
            loss_type=loss_type,
            ipo_reduction=ipo_reduction,
            chosen_lengths=chosen_tokens[first:last],
            rejected_lengths=rejected_tokens[first:last],
        )

    # One group is the primitive itself, which also goes where groups cannot: without a gradient, and where the host may
    # not look at the lengths that groups are made from.
    trains = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    plan = plan_of(inputs, weight, bias, counts, workspace) if trains and counts is not None else None
    if plan is not None and len(plan.groups) > 1:
        loss, logps = grouped_loss(
            hidden, weight, bias, inputs, tokens, counts, plan, lambda *arguments: of_pairs(*arguments)[0]
        )
        losses, chosen_rewards, rejected_rewards = of_pairs(logps)
    else:
        retain_bytes = workspace if plan is None else plan.kept * row_bytes(inputs)
        token_wise, *_ = differentiable_logps(inputs, retain_bytes)
        logps = _sum_sequences(token_wise.view(targets.shape), cu_seqlens)
        losses, chosen_rewards, rejected_rewards = of_pairs(logps)
        loss = losses.mean()
    chosen_logps, rejected_logps = logps.detach().chunk(2)
    compute = compute_dtype(inputs.hidden.dtype)
    return DPOOutput(
        loss=loss.to(compute),
        losses=losses.detach().to(compute),
        chosen_logps=chosen_logps.to(compute),
        rejected_logps=rejected_logps.to(compute),
        chosen_rewards=chosen_rewards.to(compute),
        rejected_rewards=rejected_rewards.to(compute),
        chosen_tokens=chosen_tokens,
        rejected_tokens=rejected_tokens,
    )


class DPOLoss(nn.Module):
    """:func:`dpo_loss` as a module: the options are given once, the tensors at each call.

    Args: as the options of :func:`dpo_loss`.
    """

    def __init__(
        self,
        *,
        beta: float = 0.1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        ipo_reduction: str | None = None,
        ignore_index: int = -100,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        workspace: int | None = None,
    ) -> None:
        super().__init__()
        check_loss_options(loss_type, beta, label_smoothing, ipo_reduction)
        self.options = {
            "beta": beta,
            "loss_type": loss_type,
            "label_smoothing": label_smoothing,
            "ipo_reduction": ipo_reduction,
            "ignore_index": ignore_index,
            "logit_scale": logit_scale,
            "softcap": softcap,
            "temperature": temperature,
            "workspace": workspace,
        }

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        *,
        ref_hidden: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_logps: Tensor | None = None,
        bias: Tensor | None = None,
        ref_bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> DPOOutput:
        """Shapes, result and errors as in :func:`dpo_loss`."""
        return dpo_loss(
            hidden,
            weight,
            targets,
            ref_hidden=ref_hidden,
            ref_weight=ref_weight,
            ref_logps=ref_logps,
            bias=bias,
            ref_bias=ref_bias,
            cu_seqlens=cu_seqlens,
            **self.options,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _check_layout(hidden: Tensor, targets: Tensor, cu_seqlens: Tensor | None, ignore_index: int) -> None:
    """Raises ValueError unless hidden and targets are 2B rows, or 2B packed sequences."""
    if cu_seqlens is None:
        if targets.dim() != 2 or targets.shape[0] % 2 or targets.shape[0] == 0:
            raise ValueError(
                f"targets has shape {tuple(targets.shape)}; it should be [2B, T], an even number of rows, chosen rows "
                "first; or give cu_seqlens for packed sequences"
            )
    else:
        if targets.dim() != 1:
            raise ValueError(f"targets has shape {tuple(targets.shape)}; with cu_seqlens it should be [N]")
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() % 2 == 0 or cu_seqlens.numel() < 3:
            raise ValueError(
                f"cu_seqlens has shape {tuple(cu_seqlens.shape)}; it should be [2B + 1]: the bounds of the B chosen "
                "and then the B rejected sequences"
            )
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens has dtype {cu_seqlens.dtype}; it should be torch.int64 or torch.int32")
        if cu_seqlens.device != targets.device:
            raise ValueError(
                f"cu_seqlens is on {cu_seqlens.device}, targets on {targets.device}; they should be on one"
            )
        if not _must_not_wait(hidden):
            bounds = cu_seqlens.tolist()
            ordered = all(a <= b for a, b in zip(bounds, bounds[1:], strict=False))
            if bounds[0] != 0 or bounds[-1] != targets.numel() or not ordered:
                raise ValueError(f"cu_seqlens should rise from 0 to N = {targets.numel()}; it is {bounds}")


def _must_not_wait(tensor: Tensor) -> bool:
    """Whether the host may not look at the tensor's values: in a graph being compiled or captured."""
    return torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _count_scored(tokens: Tensor, ignore_index: int) -> list[int]:
    """The numbers of scored tokens; ValueError where a completion has none: its log-probability would mean nothing."""
    counts = tokens.tolist()
    pairs = len(counts) // 2
    empty = [f"{'chosen' if i < pairs else 'rejected'} of pair {i % pairs}" for i, n in enumerate(counts) if n == 0]
    if empty:
        raise ValueError(
            f"targets has completions in which every position is ignore_index ({ignore_index}): {', '.join(empty[:8])}"
            f"{', …' if len(empty) > 8 else ''}; each should score at least one token: drop these pairs"
        )
    return counts


def _sum_sequences(values: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """[2B, T], or [N] with bounds [2B + 1], to sums [2B]; without atomics, so that results repeat.

    Floats are summed in float64: a sequence's log-probability is hundreds of nats, a loss depends on differences of
    four of them, and float32 would round each by more than all the tokens' errors come to.
    """
    if cu_seqlens is None:
        return values.sum(-1, dtype=torch.float64 if values.is_floating_point() else None)
    if values.dtype == torch.int64:  # segment_reduce takes floats alone
        totals = F.pad(values.cumsum(0), (1, 0))
        return totals[cu_seqlens[1:]] - totals[cu_seqlens[:-1]]
    return torch.segment_reduce(values.double(), "sum", offsets=cu_seqlens.to(torch.int64), unsafe=True)
