"""Liger's fused DPO loss, with its constructor, call and results, computed by :func:`fastdpo.dpo_loss`.

    from fastdpo.integrations.liger import LigerFusedLinearDPOLoss  # was: from liger_kernel.chunked_loss import …

The contract is that of liger-kernel 0.8.5, which need not be installed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdpo.loss import dpo_loss
from fastdpo.loss.options import LossOptions

LOSS_TYPES = (
    "sigmoid",
    "hinge",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "discopop",
)

_DEFAULT_TAU = 0.05


class FusedLinearDPOLoss(nn.Module):
    """The preference loss of B pairs from hidden states, called as ``LigerFusedLinearDPOLoss``.

    Losses, gradients, log-probabilities and rewards are Liger's, but where these are wrong:

    - Mean logits are over the vocabulary and the scored positions, as TRL logs them. Liger's are over all T positions,
      prompt and padding included.
    - A completion in which nothing is scored has log-probability 0, as in Liger, and 0 too as a mean. Liger's mean is
      0 / 0, and makes the loss and the gradients of the whole batch NaN; so is its loss, with every option, where no
      chosen completion has a scored token. Here the NLL is 0 then.
    - ``label_smoothing`` makes ``sigmoid`` the conservative DPO that Liger announces; Liger ignores it there. With a
      loss that does not define it, it raises, as does ``discopop_tau``: in Liger they have no effect.
    - ``discopop`` stays finite where a margin is so negative that Liger's exponential overflows.
    - The logits that the softmax sees are float32; Liger's are rounded to the inputs' type, and so is each of its
      sums of gradients. Inputs of float64 are computed in float64, which Liger takes to float32.
    - An odd number of rows raises. Liger takes one more rejected than chosen.

    Args:
        ignore_index: the target of positions that are not scored.
        beta, label_smoothing: see :class:`fastdpo.LossOptions`.
        alpha: factor of the chosen completions' negative log-likelihood, where ``compute_nll_loss`` adds it to the
            loss. It is a mean over the tokens of the batch.
        compute_nll_loss: add that term.
        compiled: accepted, without effect: there is nothing to compile.
        use_ref_model: False takes the reference's log-probabilities as 0, whatever reference is given.
        average_log_prob: means over tokens in the place of sums, of the policy and the reference alike.
        chunk_size: accepted, without effect: the pairs that come together follow from memory (``workspace`` of
            :func:`fastdpo.dpo_loss`), and change no result beyond rounding.
        loss_type: ``sigmoid``, ``hinge``, ``exo_pair``, ``nca_pair``, ``robust``, ``bco_pair``, ``sppo_hard``,
            ``apo_zero``, ``apo_down`` or ``discopop``.
        discopop_tau: temperature of ``discopop``.

    Raises:
        ValueError: an option out of range, another ``loss_type``, or an option that the loss does not define.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        alpha: float = 1.0,
        compute_nll_loss: bool = False,
        compiled: bool = True,
        use_ref_model: bool = True,
        average_log_prob: bool = False,
        chunk_size: int = 1,
        loss_type: str = "sigmoid",
        label_smoothing: float = 0.0,
        discopop_tau: float = 0.05,
    ) -> None:
        super().__init__()
        # Liger's attributes, which may be changed between calls as Liger's may.
        self.ignore_index = ignore_index
        self.beta = beta
        self.alpha = alpha
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.average_log_prob = average_log_prob
        self.chunk_size = chunk_size
        self.loss_type = loss_type
        self.label_smoothing = label_smoothing
        self.discopop_tau = discopop_tau
        LossOptions(**self._options())  # raises

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """The loss, and what trainers log.

        Args:
            lin_weight: [V, H], the output embedding.
            _input: [2B, T, H] hidden states, the B chosen rows first. float32, bfloat16, float16 or float64.
            target: [2B, T] int64, already shifted: target[t] is what _input[t] predicts.
            bias: [V].
            ref_input, ref_weight, ref_bias: the same of the reference model; no gradient.

        Returns:
            (loss, (chosen_logps, rejected_logps, chosen_logits_mean, rejected_logits_mean, nll_loss, chosen_rewards,
            rejected_rewards)): the loss a scalar, differentiable once in _input, lin_weight and bias; the others
            detached, scalars but for log-probabilities and rewards, which are [B]. nll_loss is 0 without
            ``compute_nll_loss``. All float32, or float64 for float64 inputs.

        Raises:
            TypeError, ValueError, IndexError: as :func:`fastdpo.dpo_loss`; a reference model that is to be used and is
                not given.
        """
        reference: dict[str, Any] = {}
        if self.use_ref_model:
            if ref_input is None or ref_weight is None:
                name = "ref_input" if ref_input is None else "ref_weight"
                raise ValueError(f"{name} is None; give it, or use_ref_model=False to go without a reference model")
            reference = {"ref_hidden": ref_input, "ref_weight": ref_weight, "ref_bias": ref_bias}
        output = dpo_loss(
            _input,
            lin_weight,
            target,
            bias=bias,
            ignore_index=self.ignore_index,
            outputs=("mean_logits",),
            allow_empty=True,
            **reference,
            **self._options(),
        )
        assert output.mean_logits is not None  # as it was asked for
        chosen_mean, rejected_mean = output.mean_logits.chunk(2)
        nll = torch.zeros_like(output.loss)
        if self.compute_nll_loss:
            # Of log-probabilities that already are means, the token mean weighs each by its tokens.
            weights = output.chosen_tokens if self.average_log_prob else torch.ones_like(output.chosen_tokens)
            nll = -(output.chosen_logps * weights).sum() / output.chosen_tokens.sum().clamp(min=1)
        return output.loss, (
            output.chosen_logps,
            output.rejected_logps,
            _token_mean(chosen_mean, output.chosen_tokens),
            _token_mean(rejected_mean, output.rejected_tokens),
            nll,
            output.chosen_rewards,
            output.rejected_rewards,
        )

    def _options(self) -> dict[str, Any]:
        """The keywords of :class:`LossOptions`; ValueError for a loss that Liger's class does not have."""
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(
                f"loss_type is {self.loss_type!r}; it should be one of {', '.join(LOSS_TYPES)}, as Liger's; "
                "fastdpo.DPOLoss has others"
            )
        options: dict[str, Any] = {
            "beta": self.beta,
            "loss_type": self.loss_type,
            "label_smoothing": self.label_smoothing,
            "average_log_prob": self.average_log_prob,
        }
        if self.compute_nll_loss and self.alpha:
            options |= {"sft_weight": self.alpha, "sft_reduction": "batch"}
        if self.loss_type == "discopop" or self.discopop_tau != _DEFAULT_TAU:
            options["discopop_tau"] = self.discopop_tau
        return options


LigerFusedLinearDPOLoss = FusedLinearDPOLoss


def _token_mean(means: Tensor, tokens: Tensor) -> Tensor:
    """The mean over all tokens from [B] means over each completion's; 0 where there are none."""
    return (means * tokens).sum() / tokens.sum().clamp(min=1)
