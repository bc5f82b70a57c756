"""A few steps of DPO written out: full logits, log_softmax, plain gradient descent; for the trainer to equal."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

# The trainer's settings with which its steps are those of `train_by_hand`. All rows are in every batch.
PLAIN_DESCENT: dict[str, Any] = {
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "weight_decay": 0.0,
    "packing": "padded",
}


def completion_logps(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """[2B] float64: the sum of each completion's log-probabilities."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
    logps = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return (logps * batch["completion_mask"][:, 1:]).sum(-1)


def train_by_hand(
    policy: nn.Module, reference_logps: Callable[[dict[str, Tensor]], Tensor], batch: dict[str, Tensor], **settings: Any
) -> list[float]:
    """The losses before each of ``steps`` updates of ``policy``'s parameters that require a gradient."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    with torch.no_grad():
        reference = reference_logps(batch)
    losses = []
    for _ in range(settings["max_steps"]):
        chosen, rejected = (completion_logps(policy, batch) - reference).chunk(2)
        loss = -nn.functional.logsigmoid(settings["beta"] * (chosen - rejected)).mean()
        gradients = torch.autograd.grad(loss, trained)
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter -= settings["learning_rate"] * gradient
        losses.append(loss.item())
    return losses


def frozen(model: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
    """``model`` as it is now, whatever becomes of it."""
    now = copy.deepcopy(model).eval()
    return lambda batch: completion_logps(now, batch)
