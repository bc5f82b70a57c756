"""dpo_loss: the losses for callers who have hidden states and the output embedding.

The losses themselves are in ``objectives.py``, their options in ``options.py``; what they are of in ``units.py``; how a
batch is taken in groups is in ``groups.py``. Notation: B pairs; a log-ratio is log pi(y|x) - log pi_ref(y|x), in nats;
rewards are beta times it (Rafailov et al. 2023, arXiv 2305.18290, eq. 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastdpo.logps.dense import refuse_not_dense
from fastdpo.logps.low_rank import LowRankUpdate
from fastdpo.logps.native import compute_dtype
from fastdpo.logps.ops import OUTPUTS, OpInputs, named_outputs, op_inputs
from fastdpo.logps.out_of_memory import in_less_memory
from fastdpo.logps.primitive import DEFAULT_RETAIN_BYTES, Vocabulary, differentiable_logps, vocabulary_of
from fastdpo.logps.sharded import gathered, refuse_sharded
from fastdpo.logps.wide import widened
from fastdpo.loss.groups import GroupedBatch, grouped_loss, plan_of, row_bytes
from fastdpo.loss.options import LossKeywords, LossOptions
from fastdpo.loss.output_of import output_of
from fastdpo.loss.outputs import DPOOutput
from fastdpo.loss.pair_losses import PairLosses
from fastdpo.loss.ranking_losses import RankingLosses
from fastdpo.loss.reference import Reference, reference_sums
from fastdpo.loss.sequences import Sequences, count_sequences
from fastdpo.loss.units import Units, check_numbers, units_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

# The per-token outputs that become metrics.
METRIC_OUTPUTS = ("entropy", "mean_logits", "is_top1")


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
    pairs: Tensor | None = None,
    rankings: Tensor | None = None,
    weights: Tensor | None = None,
    margins: Tensor | None = None,
    beta: float = 0.1,
    loss_type: str | Sequence[str] = "sigmoid",
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    workspace: int | None = None,
    outputs: Sequence[str] = (),
    allow_empty: bool = False,
    low_rank: LowRankUpdate | Sequence[LowRankUpdate] = (),
    group: dist.ProcessGroup | None = None,
    sequence_group: dist.ProcessGroup | None = None,
    **options: Unpack[LossKeywords],
) -> DPOOutput:
    """The preference loss of B pairs from hidden states, without their logits in memory.

    Without ``pairs`` these are the two halves of the sequences. With them there are S sequences, each scored once, and
    a sequence may be of any number of pairs: of K answers to a prompt all K (K - 1) / 2, say, at the cost of K. In what
    follows 2B is then S, and B is P. ``loss_type="plackett_luce"`` is a loss of rankings, R of them, in their place.

    The reference is given as hidden states (``ref_hidden``, with ``ref_weight`` and ``ref_bias`` where its output
    embedding is another one), or as log-probabilities (``ref_logps``), or not at all (reference-free).

    Args:
        hidden: [2B, T, H], the B chosen rows first, then the B rejected ones in the same order (in any order with
            ``pairs``); or, with ``cu_seqlens``, [N, H]: 2B sequences one after another, likewise. float32, bfloat16,
            float16 or float64.
        weight: [V, H], the output embedding. A DTensor is gathered, as in :func:`fastdpo.token_logps`.
        targets: [2B, T] or [N] int64, already shifted: targets[t] is what hidden[t] predicts. ``ignore_index`` where
            nothing is scored (prompt, padding).
        ref_hidden: as ``hidden`` (its H may differ with ``ref_weight``), from the reference model. No gradient.
        ref_weight, ref_bias: [V, H_ref] and [V]; by default ``weight`` and ``bias``, without their gradient.
        ref_logps: the reference's log-probabilities, in nats: [2B], summed over each completion; or of targets' shape,
            for each token, as ``ld_alpha`` needs them (anything where nothing is scored).
        bias: [V].
        cu_seqlens: [2B + 1] int64 or int32, the packed sequences' bounds: 0, …, N.
        pairs: [P, 2] int64 or int32, which of the S sequences is chosen and which rejected. A sequence that is of none
            has no gradient.
        rankings: [R, K] int64 or int32, for ``plackett_luce``: which sequences, the best first, at least two; one that
            has fewer than K is filled up with -1.
        weights: [P] (or [R]), at least 0, of a floating dtype: what each pair counts. The loss is
            sum(weights * losses) / sum(weights), the mean over pairs where all are the same, and a pair of weight 0 is
            as if it were not there. Also ``sft_reduction="batch"`` counts a pair's tokens by its weight, and the losses
            that sort the batch, ``aot`` and ``aot_unpaired``, count it as often in their quantiles.
        margins: [P], finite, of a floating dtype: what each pair's margin m is to exceed. m - margins stands in m's
            place, as in ODPO (Amini et al. 2024, arXiv 2402.10571, eq. 8) and in TRL's reward models. For the losses
            that are functions of a margin: sigmoid, sigmoid_norm, hinge, exo_pair, robust, discopop, dpop, simpo, cpo.
        beta, loss_type, label_smoothing, options: see :class:`fastdpo.LossOptions`.
        ignore_index, logit_scale, softcap, temperature: as in :func:`fastdpo.token_logps`.
        workspace: bytes that may be spent on computing less where ``weight`` (or ``bias``) needs a gradient; 0 will do.
            A token whose exponentials are kept until its losses are known costs 3 products of H x V, any other 4.
            They take up V numbers of hidden's dtype (float32 for float16). A batch of more tokens than that holds is
            taken in groups of at least some 512 tokens, one after another in the same memory. Their gradients of
            ``weight`` are summed in float32, and the sum for a 16-bit weight, 4 V H bytes, counts too: less room than
            that makes one group. (4 V H + 2000 V has room for groups of 1,000 tokens in bfloat16.) Default: 256 MiB.
            It changes nothing where ``hidden`` alone needs a gradient: 2 products, and N x H numbers of memory. A loss
            that couples pairs (``aot``, ``aot_unpaired``) needs them all at once, and is not taken in groups; pairs
            that share sequences are in one.
        outputs: any of ``entropy``, ``mean_logits``, ``is_top1``: metrics of the policy from the same pass.
        allow_empty: take a completion in which nothing is scored for one of log-probability 0, and its means over
            tokens for 0, in the place of raising. The pair's other completion is trained on as ever.
        low_rank: LoRA on the policy's output embedding, as in :func:`fastdpo.token_logps`. Where ``ref_weight`` is not
            given, the reference's is ``weight`` without it.
        group: the ranks over which the vocabulary is cut, as in :func:`fastdpo.token_logps`; ``ref_weight`` and
            ``ref_bias`` are then cut likewise.
        sequence_group: the ranks over which the tokens are cut (sequence parallelism): each has some of every
            sequence's, in ``hidden`` and ``targets`` (and token-wise ``ref_logps``), maybe none of one. Sums over the
            sequences are exchanged, 2B numbers a kind, and every rank has the whole loss and calls backward; hidden's
            gradient is that of the rank's own tokens, and weight's their share, to be summed over the group. Not with
            ``ld_alpha``. With any of these three a batch is not taken in groups.

    Returns:
        :class:`fastdpo.DPOOutput`. Where policy and reference agree, the sigmoid loss is ln 2 and every reward is 0.
        Differentiable once, in hidden, weight and bias, and through ``loss`` alone.

    Raises:
        TypeError, ValueError, IndexError: naming the argument, what it was and what it should be; among them a
            completion in which nothing is scored (unless ``allow_empty``), a pair of a sequence with itself, and
            weights that are negative, not finite, or all 0.
        NotImplementedError: a second derivative, forward-mode differentiation, or vmap; ``low_rank`` with ``group``, or
            ``ld_alpha`` with ``sequence_group``.
        torch.OutOfMemoryError: memory did not suffice, with half of ``workspace`` either (which is tried, with a
            warning, unless there is a group of ranks).

    With several processes, call it in the forward of the model that is wrapped, where every wrapper does its part (as
    :class:`fastdpo.model.FusedHead` does). If it is called outside, on hidden states that the wrapped model's forward
    returned and on the model's own weight, then DDP averages the gradients as any others (with
    ``find_unused_parameters=True`` it raises, if that forward had no use for the weight), and so does FSDP2, whose
    DTensor is gathered once for policy and reference. But what comes from ``ddp.module(...)``, past DDP's forward, has
    gradients that are never averaged, for any parameter, and nothing says so. A weight that ZeRO-3 or FSDP1 has
    partitioned is refused.
    """
    o = LossOptions(beta, loss_type, label_smoothing, **options)
    if workspace is None:
        workspace = DEFAULT_RETAIN_BYTES
    if workspace < 0:
        raise ValueError(f"workspace is {workspace}; it should be at least 0")
    for name in outputs:
        if name not in METRIC_OUTPUTS:
            raise ValueError(f"outputs names {name!r}; it may name {', '.join(METRIC_OUTPUTS)}")
    if sequence_group is not None and o.ld_alpha is not None:
        raise NotImplementedError("ld_alpha counts a sequence's tokens from its start, which sequence_group divides")
    refuse_not_dense(hidden=hidden, weight=weight, targets=targets, bias=bias, cu_seqlens=cu_seqlens)
    refuse_not_dense(pairs=pairs, rankings=rankings, weights=weights, margins=margins)
    refuse_not_dense(ref_hidden=ref_hidden, ref_weight=ref_weight, ref_logps=ref_logps, ref_bias=ref_bias)
    refuse_sharded(hidden=hidden, targets=targets, ref_hidden=ref_hidden)
    vocabulary = vocabulary_of(weight, bias, low_rank, group)
    weight, bias = gathered(weight), gathered(bias)
    reference = Reference(ref_hidden, ref_weight, ref_bias, ref_logps)
    reference.check(o, hidden)
    look = not _must_not_wait(hidden)
    units = units_of(
        pairs,
        _rankings_of(o, pairs, rankings),
        weights,
        sequences=count_sequences(targets, cu_seqlens, halves=pairs is None and rankings is None),
        device=targets.device,
        look=look,
    )
    sequences = Sequences(
        targets,
        cu_seqlens,
        ignore_index,
        at_shorter=o.ld_alpha is not None,
        look=look,
        members=units.members,
        allow_empty=allow_empty,
        group=sequence_group,
    )
    head_options: dict[str, Any] = {
        "ignore_index": ignore_index,
        "logit_scale": logit_scale,
        "softcap": softcap,
        "temperature": temperature,
        "num_scored": None if sequences.counts is None else sum(sequences.counts),
    }
    inputs = op_inputs(hidden, weight, targets, bias, **head_options)
    ref_logps = reference.computed_logps(weight, bias, targets, group, head_options)
    ref_sums = reference_sums(o, ref_logps, sequences, targets, ignore_index)
    losses_of: PairLosses | RankingLosses
    if o.of_rankings:
        if margins is not None:
            o.check_margins("margins")
        assert units.members is not None
        losses_of = RankingLosses(o, sequences.lengths, ref_sums, units.members, allow_empty=allow_empty)
    else:
        if margins is not None:
            o.check_margins("margins")
            check_numbers(margins, "margins", units.count, targets.device, look=look)
            margins = widened(margins.detach())
        of_pairs = {"pairs": units.members, "weights": units.weights, "margins": margins}
        losses_of = PairLosses(o, sequences.lengths, ref_sums, **of_pairs, allow_empty=allow_empty)

    asked = {*outputs, *(("log_sum_sq_probs",) if o.use_weighting else ())}
    names = [name for name in OUTPUTS if name in asked]

    def policy_sums(room: int) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        tensors = (hidden, weight, bias)
        return _policy_sums(tensors, inputs, vocabulary, sequences, targets, units, losses_of, room, names)

    if group is None and sequence_group is None:
        sums, extras, loss = in_less_memory(policy_sums, workspace, "workspace", inputs)
    else:  # a rank that tries again would leave the others waiting
        sums, extras, loss = policy_sums(workspace)
    return output_of(
        loss, losses_of, units, sums, extras, sequences.tokens, outputs, compute_dtype(inputs.hidden.dtype)
    )


def _policy_sums(
    differentiable: tuple[Tensor, Tensor, Tensor | None],
    inputs: OpInputs,
    vocabulary: Vocabulary,
    sequences: Sequences,
    targets: Tensor,
    units: Units,
    losses_of: PairLosses | RankingLosses,
    workspace: int,
    outputs: Sequence[str],
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """The sums of log-probabilities [S, C], those of ``outputs`` [S], and the loss.

    The loss is None where it is yet to be made from the sums, which are then differentiable.
    """
    hidden, weight, bias = differentiable
    trains = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in differentiable)
    # One group is the primitive itself, which also goes where groups cannot: without a gradient, where pairs' losses
    # depend on each other, where the host may not look at the lengths that groups are made from, and where other ranks
    # or updates have a part in them.
    plan = None
    is_here = vocabulary.is_here and sequences.group is None
    if trains and is_here and sequences.counts is not None:
        counts, components = sequences.counts, units.components()
        tokens = [sum(counts[i] for i in together) for together in components.sequences]
        plan = plan_of(inputs, weight, bias, tokens, workspace)
        if len(plan.groups) > 1 and not losses_of.options.couples_pairs:
            batch = GroupedBatch(inputs, sequences.lengths, counts, units, components, plan, losses_of, tuple(outputs))
            loss, sums, extras = grouped_loss(hidden, weight, bias, batch)
            return sums, extras, loss
    retain_bytes = plan.kept * row_bytes(inputs) if plan is not None and len(plan.groups) == 1 else workspace
    logps, *values = differentiable_logps(inputs, retain_bytes, outputs, vocabulary)
    fields = named_outputs(values, outputs, inputs)
    extras = {name: widened(sequences.sums(value.view(targets.shape))) for name, value in fields.items()}
    return sequences.segment_sums(logps.view(targets.shape)), extras, None


def _rankings_of(options: LossOptions, pairs: Tensor | None, rankings: Tensor | None) -> Tensor | None:
    """Raises ValueError unless what is given is what the loss is of."""
    if options.of_rankings and (rankings is None or pairs is not None):
        raise ValueError(
            f"{options.described} is a loss of rankings: give rankings, [R, K] sequences, the best first"
            f"{', and no pairs' if pairs is not None else ''}"
        )
    if rankings is not None and not options.of_rankings:
        raise ValueError(f"rankings is given, but {options.described} is a loss of pairs: give pairs")
    return rankings


# Private; without it torch.func has token_logps alone.
_in_transform = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)


def _must_not_wait(tensor: Tensor) -> bool:
    """Whether the host may not look at values: in a graph being compiled or captured, in torch.func, of mere shapes."""
    return (
        torch.compiler.is_compiling()
        or _in_transform()
        or tensor.is_meta
        or isinstance(tensor, FakeTensor)
        or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
    )
