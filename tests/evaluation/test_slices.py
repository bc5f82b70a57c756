"""fastdpo.evaluation.slices: every pair is in one part of each kind."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdpo.evaluation.slices import Slice, slices_of


def by(parts: list[Slice], kind: str) -> dict[str, list[int]]:
    return {part.name: part.places.tolist() for part in parts if part.by == kind}


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 30)), min_size=1, max_size=60))
def test_each_kind_parts_the_pairs(rows: list[tuple[int, int, int]]) -> None:
    chosen, rejected, values = map(list, zip(*rows, strict=True))
    parts = slices_of(np.array(chosen), np.array(rejected), {"value": values})
    assert parts[0].by == "all" and parts[0].places.tolist() == list(range(len(rows)))
    for kind in {part.by for part in parts}:
        places = [place for part in parts if part.by == kind for place in part.places.tolist()]
        assert sorted(places) == list(range(len(rows)))
    assert all(len(part.places) for part in parts)
    assert len(by(parts, "value")) <= 13
    lengths = (np.array(chosen) + np.array(rejected)) / 2
    quarters = [part.places for part in parts if part.by == "tokens an answer"]
    assert all(lengths[a].max() < lengths[b].min() for a, b in zip(quarters, quarters[1:], strict=False))


def test_which_answer_is_longer_and_quarters() -> None:
    parts = slices_of(np.array([5, 1, 3, 9]), np.array([1, 5, 3, 1]), {})
    assert by(parts, "the longer answer") == {"the chosen one": [0, 3], "the rejected one": [1], "neither": [2]}
    even = slices_of(np.arange(1, 9), np.arange(1, 9), {})
    assert list(by(even, "tokens an answer")) == [
        "shortest quarter, 1 to 2",
        "second quarter, 3 to 4",
        "third quarter, 5 to 6",
        "longest quarter, 7 to 8",
    ]


def test_rare_values_are_one_part() -> None:
    values = ["a"] * 3 + [f"v{i:02}" for i in range(14)]
    found = by(slices_of(np.ones(17), np.ones(17), {"source": values}), "source")
    assert list(found) == ["a", *(f"v{i:02}" for i in range(11)), "(3 other values)"]
    assert found["(3 other values)"] == [14, 15, 16]
    found = by(slices_of(np.ones(3), np.ones(3), {"source": [None, {"b": 1}, "x" * 99]}), "source")
    assert set(found) == {"(none)", '{"b": 1}', "x" * 59 + "…"}
