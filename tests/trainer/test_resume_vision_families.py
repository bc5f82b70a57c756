"""Every vision-language class of transformers, made tiny: two steps and two resumed ones are four unbroken ones.

In float32 on the CPU, to the last bit: weights, those of the vision tower too, optimiser and losses; or the class is
refused before training. A few are always run, the others by hand (--run-slow, ten minutes).
"""

from __future__ import annotations

import pytest
from models_page import PAGE, vision_cells_of
from tiny_vision_families import NOT_MADE, VISION_FAMILIES, make_vision_family
from vision_survey import survey_vision

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")

# Other names in the checkpoint than in the model, experts, what says something of each token, a frozen part; and one
# that has no words, and one that would not come back.
USUAL = ("emu3", "ernie4_5_vl_moe", "gemma3", "mllama", "pi0", "qwen3_vl_moe", "shieldgemma2")


def test_the_usual_ones_are_families() -> None:
    assert set(USUAL) | set(NOT_MADE) <= set(VISION_FAMILIES)


@pytest.mark.parametrize("family", sorted(NOT_MADE))
def test_what_cannot_be_built(family: str) -> None:
    with pytest.raises(Exception):  # noqa: B017  # when it can be, it is to be tried
        make_vision_family(family)


@pytest.mark.parametrize(
    "family", [name if name in USUAL else pytest.param(name, marks=pytest.mark.slow) for name in VISION_FAMILIES]
)
def test_two_and_two_steps_are_four_and_the_table_says_so(family: str) -> None:
    found = survey_vision(family)
    written = vision_cells_of(PAGE.read_text(encoding="utf-8"), family)
    how = "python tests/support/models_page.py writes the page"
    assert {name: getattr(found, name) for name in ("images", "resume")} == {
        name: written[name] for name in ("images", "resume")
    }, how
