"""The state of optimisers in parts; that runs go on from it is in test_parallel_resume.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastdpo.trainer.optimizer_parts import schedule_for


def _schedule(groups: int, steps: int = 0) -> torch.optim.lr_scheduler.LambdaLR:
    parameters = [{"params": [nn.Parameter(torch.ones(()))]} for _ in range(groups)]
    schedule = torch.optim.lr_scheduler.LambdaLR(torch.optim.SGD(parameters, lr=0.1), lambda step: 1 / (1 + step))
    for _ in range(steps):
        schedule.optimizer.step()
        schedule.step()
    return schedule


def test_a_schedule_goes_on_with_other_groups() -> None:
    kept = _schedule(2, steps=3).state_dict()
    for groups in (1, 2, 5):
        schedule = _schedule(groups)
        schedule.load_state_dict(schedule_for(kept, groups))
        assert schedule.get_last_lr() == pytest.approx([0.1 / 4] * groups)
        schedule.optimizer.step()
        schedule.step()
        assert schedule.get_last_lr() == pytest.approx([0.1 / 5] * groups)


def test_groups_of_their_own_are_left_as_they_are() -> None:
    kept = _schedule(2).state_dict() | {"base_lrs": [0.1, 0.2]}
    assert schedule_for(kept, 2) == kept
    assert schedule_for(kept, 3)["base_lrs"] == [0.1, 0.2]
