"""torchtune's preference losses, with their constructors, calls and results, over :func:`fastdpo.preference_loss`.

In a recipe's configuration ``loss._component_: fastdpo.integrations.torchtune.DPOLoss``, or in code

    from fastdpo.integrations.torchtune import DPOLoss  # was: from torchtune.rlhf.loss import DPOLoss

The contract is that of torchtune 0.6; the call of 0.5, four tensors, works as well. torchtune need not be installed.
Its ``SimPOLoss``, gone from 0.6, is ``fastdpo.dpo_loss(..., loss_type="simpo")``.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from fastdpo.loss import preference_loss
from fastdpo.loss.options import LossOptions


class ChosenRejectedLogps(Protocol):
    """What the losses read of torchtune's ``ChosenRejectedOutputs``, policy's or reference's."""

    @property
    def chosen_logps(self) -> Tensor:
        """[B], sums of log pi(token) over each chosen completion, in nats."""

    @property
    def rejected_logps(self) -> Tensor:
        """[B], the same of the rejected completions."""


class _PairLoss(nn.Module):
    """A loss of torchtune's: what is called."""

    @property
    def is_reference_free(self) -> bool:
        """Recipes ask whether they can go without the reference's log-probabilities."""
        return False

    def forward(
        self,
        policy_inputs: ChosenRejectedLogps | Tensor,
        reference_inputs: ChosenRejectedLogps | Tensor,
        reference_chosen_logps: Tensor | None = None,
        reference_rejected_logps: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Losses and rewards of B pairs.

        Args:
            policy_inputs, reference_inputs: each with ``chosen_logps`` and ``rejected_logps``, [B]. Or, as in
                torchtune 0.5, the policy's chosen and rejected log-probabilities themselves, [B], followed by
            reference_chosen_logps, reference_rejected_logps: the reference's.

        Returns:
            (losses, chosen_rewards, rejected_rewards), each [B]; the rewards are detached.

        Raises:
            TypeError: neither of the two calls.
            ValueError: the shapes do not agree.
        """
        logps = _of_call(policy_inputs, reference_inputs, reference_chosen_logps, reference_rejected_logps)
        return preference_loss(*logps, **self._options())

    def _options(self) -> dict[str, Any]:
        """The keywords of :func:`fastdpo.preference_loss`."""
        raise NotImplementedError


class DPOLoss(_PairLoss):
    """DPO (arXiv 2305.18290, eq. 7); with ``label_smoothing`` conservative DPO.

    Args:
        beta, label_smoothing: see :class:`fastdpo.LossOptions`.

    Raises:
        ValueError: one of them is out of range.
    """

    def __init__(self, beta: float = 0.1, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.beta, self.label_smoothing = beta, label_smoothing
        LossOptions(**self._options())  # raises

    def _options(self) -> dict[str, Any]:
        return {"beta": self.beta, "label_smoothing": self.label_smoothing}


class RSOLoss(_PairLoss):
    """The hinge of RSO (Liu et al. 2023, arXiv 2309.06657, sec. 3.2): ``hinge``, with gamma for beta.

    Args:
        gamma: factor of the log-ratios, above 0.

    Raises:
        ValueError: it is not.
    """

    def __init__(self, gamma: float = 0.1) -> None:
        super().__init__()
        self.gamma = gamma
        if not gamma > 0:
            raise ValueError(f"gamma is {gamma}; it should be above 0 (0.1 is usual)")

    def _options(self) -> dict[str, Any]:
        return {"beta": self.gamma, "loss_type": "hinge"}


def _of_call(
    first: ChosenRejectedLogps | Tensor,
    second: ChosenRejectedLogps | Tensor,
    third: Tensor | None,
    fourth: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The policy's and the reference's chosen and rejected log-probabilities, from either of torchtune's calls."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        if isinstance(third, Tensor) and isinstance(fourth, Tensor):
            return first, second, third, fourth
    elif not (isinstance(first, Tensor) or isinstance(second, Tensor)) and third is None and fourth is None:
        return first.chosen_logps, first.rejected_logps, second.chosen_logps, second.rejected_logps
    raise TypeError(
        "the call is neither of torchtune's two: give the policy's and the reference's ChosenRejectedOutputs, or "
        "four tensors: policy chosen, policy rejected, reference chosen, reference rejected log-probabilities"
    )
