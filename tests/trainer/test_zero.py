"""What a resume under DeepSpeed has to bring back beside states and weights; whole runs are in test_engines.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from fastdpo.trainer.zero import catch_up

BETA = np.float32(0.9)


class DeepSpeedCPUAdam:
    """As DeepSpeed's, as far as its powers of a beta: multiplied up, or from pow where a step does not follow."""

    def __init__(self, done: int = 0) -> None:
        self.opt_id, self.ds_opt_adam = 7, SimpleNamespace(adam_update=self.update)
        self.state: dict[int, dict[str, Any]] = {0: {"step": done}} if done else {}
        group = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "bias_correction": True}
        self.param_groups = [group]
        self.last, self.power = 0, np.float32(1)

    def update(self, number: int, step: int, lr: float, beta1: float, *others: Any) -> None:
        assert (number, lr, beta1) == (7, 0.1, 0.9) and others[:4] == (0.999, 1e-8, 0.0, True)
        assert all(isinstance(tensor, torch.Tensor) and not tensor.numel() for tensor in others[4:])
        follows = step == self.last + 1
        self.last, self.power = step, self.power * BETA if follows else np.float32(BETA**step)


def test_powers_of_a_resumed_run_are_those_of_the_unbroken_one() -> None:
    steps = range(1, 40)
    unbroken = DeepSpeedCPUAdam()
    powers = []
    for step in steps:
        unbroken.update(7, step, 0.1, 0.9, 0.999, 1e-8, 0.0, True)
        powers.append(unbroken.power)
    assert any(power != np.float32(BETA**step) for step, power in zip(steps, powers, strict=True))
    for step, power in zip(steps, powers, strict=True):
        resumed = DeepSpeedCPUAdam(done=step)
        catch_up(SimpleNamespace(basic_optimizer=resumed))
        assert (resumed.last, resumed.power) == (step, power)


def test_other_optimizers_and_new_ones_are_left_alone() -> None:
    catch_up(SimpleNamespace(basic_optimizer=torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])))
    new = DeepSpeedCPUAdam()
    catch_up(SimpleNamespace(basic_optimizer=new))
    assert new.last == 0
