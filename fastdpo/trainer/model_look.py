"""One look at a run's models before it begins: what they do, not what their configurations say."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from torch import nn

from fastdpo.model.expert_check import check_experts
from fastdpo.model.model_check import check_causal
from fastdpo.model.randomness import randomness_left
from fastdpo.model.router_loss import has_router_loss, may_have_router_loss, router_loss_coef
from fastdpo.model.scoring import Scorer, are_alike
from fastdpo.model.vision_check import check_images
from fastdpo.trainer.config import DPOConfig
from fastdpo.trainer.models import compute_dtype

logger = logging.getLogger(__name__)


class ModelLook:
    """Looks at policy and reference once, as soon as they can be run.

    Args:
        policy: what is trained.
        reference: what it is compared with, where that has a model of its own.
        args: the run's.
        accelerator: the run's.
        example: gives a pair with images as a batch, on the device; None where no row has some.

    Attributes:
        aux_loss_coef: the weight of a mixture of experts' load-balancing loss; 0 for none. Until the look, what the
            configuration says.

    Raises:
        ValueError: a weight is given, and the model has no such loss.
    """

    def __init__(
        self,
        policy: Scorer,
        reference: Scorer | None,
        args: DPOConfig,
        accelerator: Accelerator,
        example: Callable[[], dict[str, Any]] | None = None,
    ) -> None:
        self._example = example
        self._policy, self._reference, self._args, self._accelerator = policy, reference, args, accelerator
        self._is_done = False
        asked = args.router_aux_loss_coef
        if asked and not may_have_router_loss(policy.lm):
            raise self._no_such_loss()
        self.aux_loss_coef = router_loss_coef(policy.lm) if asked is None else asked

    def once(self, model: nn.Module | None = None) -> None:
        """Look, unless that was done; ``model`` is the policy as it is called now, where something is around it.

        Raises:
            NotImplementedError: a model cannot be run, sees the future, computes something else with its experts
                spread over processes, or does not look at images; the message names it.
            ValueError: as above, found by looking.
        """
        if self._is_done:
            return
        self._is_done = True
        policy = self._policy if model is None else dataclasses.replace(self._policy, root=model)
        device = self._accelerator.device
        dtype = compute_dtype(self._accelerator, policy.model)
        scorers = [policy]
        if self._reference is not None and not are_alike(policy, self._reference):
            scorers.append(self._reference)
        with self._accelerator.autocast():
            for scorer in scorers:
                check_causal(scorer, device, dtype)
                check_experts(scorer, device, dtype)
                if self._example is not None:
                    check_images(scorer, self._example(), device, dtype)
            noise = randomness_left(policy, device) if self._args.disable_dropout else None
            if noise is not None and self._accelerator.is_main_process:
                logger.warning("%s.", noise)
            if self.aux_loss_coef and not has_router_loss(policy, device):
                if self._args.router_aux_loss_coef:
                    raise self._no_such_loss()
                self.aux_loss_coef = 0.0
                if self._accelerator.is_main_process:
                    logger.info("No load-balancing loss: %s returns none.", type(policy.lm).__name__)

    def _no_such_loss(self) -> ValueError:
        config = self._policy.lm.config.get_text_config()
        return ValueError(
            f"router_aux_loss_coef is {self._args.router_aux_loss_coef}, but a {config.model_type} has no "
            "load-balancing loss, or not as it is configured here; leave it out"
        )
