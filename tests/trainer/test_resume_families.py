"""Every family of transformers, made tiny: two steps and two resumed ones are four unbroken ones, to the last bit.

In float32 on the CPU: weights, optimiser and losses; or the family is refused before training. A dozen are always run,
the others by hand (--run-slow, a quarter of an hour).
"""

from __future__ import annotations

import pytest
from family_resume import resume
from models_page import PAGE, cells_of
from tiny_families import FAMILIES, NOT_MADE, make_family

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")

# One tensor for all experts, another name of the head, a vision tower, a state: what did not come back before, mostly.
USUAL = (
    "deepseek_v3",
    "deepseek_v4",
    "gemma3",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "granitemoehybrid",
    "llama4_text",
    "mamba2",
    "minimax_m2",
    "nemotron_h",
    "qwen3_moe",
)


def test_the_usual_ones_are_families() -> None:
    assert set(USUAL) | set(NOT_MADE) <= set(FAMILIES)


@pytest.mark.parametrize("family", sorted(NOT_MADE))
def test_what_cannot_be_built(family: str) -> None:
    with pytest.raises(Exception):  # noqa: B017  # when it can be, it is to be tried
        make_family(family)


@pytest.mark.parametrize(
    "family", [name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]
)
def test_two_and_two_steps_are_four_and_the_table_says_so(family: str) -> None:
    found = resume(family)
    written = cells_of(PAGE.read_text(encoding="utf-8"), family)["resume"]
    assert found == written, "python tests/support/models_page.py writes the page"
