"""preference_loss: the losses for callers who have log-probabilities of whole sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fastdpo.logps.dense import refuse_not_dense
from fastdpo.loss.objectives import Pairs
from fastdpo.loss.options import LossKeywords, LossOptions
from fastdpo.loss.pair_losses import mixed_losses, mixed_rewards
from fastdpo.loss.reference import check_without_reference

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
    loss_type: str | Sequence[str] | None = None,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    pair_weights: Tensor | None = None,
    margins: Tensor | None = None,
    **options: Unpack[LossKeywords],
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and rewards of B pairs from sequence log-probabilities.

    Of S sequences of which ``pairs`` [B, 2] are made, ``logps[pairs].unbind(1)`` are the first two arguments, and
    the reference's likewise.

    The positional arguments, their order and the result are those of the DPO authors' ``preference_loss``.

    Args:
        policy_chosen_logps, policy_rejected_logps: [B] float, sums of log pi(token) over each completion, in nats.
        reference_chosen_logps, reference_rejected_logps: [B], the same under the reference model. None with
            ``reference_free`` (where they are not used), and for a loss that has no reference (simpo, orpo, cpo).
        beta, label_smoothing, loss_type, options: see :class:`fastdpo.LossOptions`; None is ``sigmoid``. Not
            ``ld_alpha`` and ``use_weighting``, which need tokens: they are :func:`fastdpo.dpo_loss`'s.
        ipo: the DPO authors' switch: ``loss_type="ipo"`` on sums, as their implementation computes it.
        reference_free: take the reference's log-probabilities as 0.
        chosen_lengths, rejected_lengths: [B], numbers of scored tokens; needed by losses that average over tokens.
        pair_weights: [B], factors of the pairs' losses, without a gradient (WPO's, say). Where they say what each pair
            counts, the loss is losses.sum() / pair_weights.sum(). ``aot`` and ``aot_unpaired`` count each pair as often
            in their quantiles, and a pair's loss is the one of the quantiles that it takes up.
        margins: [B], what each pair's margin is to exceed; see :func:`fastdpo.dpo_loss`.

    Returns:
        (losses, chosen_rewards, rejected_rewards), each [B], of the log-probabilities' dtype (float32 for 16-bit
        ones); the rewards are detached.

    Raises:
        ValueError: an option out of range, or one that the loss does not define; a missing or misshapen tensor.
    """
    if ipo:
        if loss_type not in (None, "ipo") or options.get("ipo_reduction") not in (None, "sum"):
            raise ValueError(
                f"ipo=True means loss_type='ipo' with ipo_reduction='sum'; got loss_type={loss_type!r} and "
                f"ipo_reduction={options.get('ipo_reduction')!r}: leave one or the other out"
            )
        loss_type, options["ipo_reduction"] = "ipo", "sum"
    o = LossOptions(beta, loss_type or "sigmoid", label_smoothing, **options)
    if o.of_rankings:
        raise ValueError(f"{o.described} is a loss of rankings, of which these are pairs; use dpo_loss with rankings")
    for name in ("ld_alpha", "use_weighting"):
        if getattr(o, name) not in (None, False):
            raise ValueError(f"{name} needs the log-probabilities of tokens, of which these are sums; use dpo_loss")

    tensors: dict[str, Tensor | None] = {
        "policy_chosen_logps": policy_chosen_logps,
        "policy_rejected_logps": policy_rejected_logps,
    }
    references = {
        "reference_chosen_logps": reference_chosen_logps,
        "reference_rejected_logps": reference_rejected_logps,
    }
    if o.takes_reference and not reference_free:
        tensors |= references
    else:
        for name, value in references.items():
            if value is not None and not reference_free:
                raise ValueError(f"{name} is given, but {o.described} has no reference; it should be None")
        check_without_reference(o)
    for name, value in tensors.items():
        if value is None:
            raise ValueError(f"{name} is None; give a tensor, or reference_free=True to go without a reference")
    if o.needs_tokens and (chosen_lengths is None or rejected_lengths is None):
        hint = ", or ipo_reduction='sum'" if o.loss_types == ("ipo",) else ""
        raise ValueError(f"{o.described} takes means over tokens: give chosen_lengths and rejected_lengths{hint}")
    if margins is not None:
        o.check_margins("margins")
    beside = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths, "pair_weights": pair_weights}
    beside |= {"margins": margins}
    refuse_not_dense(**tensors, **beside)
    for name, value in {**tensors, **beside}.items():
        if value is not None and value.shape != policy_chosen_logps.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; it should be that of policy_chosen_logps, "
                f"{tuple(policy_chosen_logps.shape)}"
            )

    # Losses are differences and powers of what 16 bits hold to some three digits.
    logps = [x.float() if x.dtype.itemsize == 2 else x for x in tensors.values() if x is not None]
    nll = -logps[0]
    if o.average_log_prob and chosen_lengths is not None and rejected_lengths is not None:
        logps = [x / n for x, n in zip(logps, (chosen_lengths, rejected_lengths) * 2, strict=False)]
    chosen, rejected, *reference = logps
    ref_chosen, ref_rejected = reference or (0.0, 0.0)
    pairs = Pairs(
        chosen=chosen - ref_chosen,
        rejected=rejected - ref_rejected,
        chosen_logps=chosen,
        rejected_logps=rejected,
        ref_chosen_logps=ref_chosen,
        ref_rejected_logps=ref_rejected,
        chosen_nll=nll,
        chosen_tokens=chosen_lengths,
        rejected_tokens=rejected_lengths,
        batch_tokens=None if chosen_lengths is None else chosen_lengths.to(nll.dtype).mean(),
        weights=None if pair_weights is None else pair_weights.detach().to(nll.dtype),
        offsets=None if margins is None else margins.detach().to(nll.dtype),
    )
    losses = mixed_losses(pairs, o)
    if pair_weights is not None:
        losses = losses * pair_weights.detach()
    return losses, *mixed_rewards(pairs, o)
