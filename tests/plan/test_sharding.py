"""What each of several devices holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import make_model

from fastdpo.plan.setup import Setup
from fastdpo.plan.sharding import STAGES, Units, share_of, units_of
from fastdpo.plan.step import count_parameters
from fastdpo.plan.tracker import PARTS

sizes = st.integers(0, 2**40)


@given(st.lists(sizes, min_size=len(PARTS), max_size=len(PARTS)), st.integers(1, 64), sizes)
def test_one_device_holds_all_and_more_stages_divide_more(values: list[int], devices: int, trained: int) -> None:
    parts, units = dict(zip(PARTS, values, strict=True)), Units(trained, trained, 0, 0)
    held = {stage: share_of(parts, stage, devices, units) for stage in STAGES}
    assert all(tuple(of_stage) == PARTS for of_stage in held.values())
    if devices == 1:
        assert all(of_stage == parts for of_stage in held.values())
    totals = [sum(held[stage].values()) for stage in STAGES]
    assert totals == sorted(totals, reverse=True)
    assert all(of_stage["activations"] == parts["activations"] for of_stage in held.values())


def test_units_are_the_layers_and_what_is_left() -> None:
    setup = Setup(make_model("llama").config)
    units, (count, _) = units_of(setup), count_parameters(setup)
    assert units.whole == units.trained == 4 * count and units.rest + 2 * units.layer == 4 * count


@pytest.mark.parametrize(("stage", "devices"), [("zero9", 2), ("ddp", 0)])
def test_what_is_none_is_refused(stage: str, devices: int) -> None:
    with pytest.raises(ValueError, match="stage is|devices is"):
        share_of(dict.fromkeys(PARTS, 1), stage, devices, Units(1, 1, 1, 1))
