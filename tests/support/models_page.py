"""docs/models.md, written from what :mod:`family_survey` finds; ``python tests/support/models_page.py`` writes it."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import astuple, replace
from pathlib import Path

import transformers
from family_resume import resume
from family_survey import MOST_TIMES, Family, survey
from tiny_families import FAMILIES
from tiny_vision_families import VISION_FAMILIES
from vision_survey import VisionFamily, survey_vision

PAGE = Path(__file__).parents[2] / "docs" / "models.md"

_HEADINGS = {
    "model_type": "Model type",
    "name": "Class",
    "trains": "Trains",
    "layout": "Layout",
    "why": "Why no layout with less work",
    "gradients": "Gradients",
    "bf16": "bf16",
    "aux_loss": "Aux loss",
    "checkpointing": "Checkpointing",
    "resume": "Resume",
    "notes": "Notes",
}

_VISION_HEADINGS = {"model_type": "Model type", "name": "Class", "images": "Images", "resume": "Resume"}
_VISION = "## Vision-language models"

_TEXT = """# Models

What a run gives with each causal language model class of transformers {version}: {count} classes, of which {trains}
train, {packed} of these in packed rows. It is found by running every class in a tiny configuration, with its windows
and chunks made short and its weights as large as trained ones. A run of yours looks at your model in the same way
before it begins, and says what it chose, and why.

`python tests/support/models_page.py` runs every class, and writes this page. `pytest tests/families --run-families`
compares it with the code, and checks that no layout that is taken is wrong: in float64, rows of 2 to 700 tokens,
windows and chunks of 4, 8 and 64 tokens, initial weights, five times these, and weights as large as trained ones; and
that packed rows in bfloat16 are at most {times} times as far from the truth as padded ones.

- **Trains**: yes; or that it is refused, before anything is trained, and what helps.
- **Layout**: of batches with `--packing auto` ([the trainer](guides/trainer.md#how-a-batch-is-laid-out)). Layers that
  carry a state need their kernels' packages to be packed, which were not there: Notes have the layout with them, found
  with torch in the place of the kernels.
- **Gradients**: whether those of the fused head, in this layout, are those of whole logits in padded rows.
- **bf16**: whether packed rows in bfloat16 are as exact as padded ones; `padded` where these are used.
- **Aux loss**: whether it returns a load-balancing loss, which is then part of the loss, in every layout that of the
  padded batch ([how a batch is laid out](guides/trainer.md#how-a-batch-is-laid-out)).
- **Checkpointing**: whether it has gradient checkpointing; where it has none, that is off.
- **Resume**: whether two steps and two more from a checkpoint are four unbroken ones, in weights, optimiser and losses,
  bit for bit in float32 on the CPU (`pytest tests/trainer/test_resume_families.py --run-slow`); or that the run is
  refused before its first step.

"""

_VISION_TEXT = f"""
{_VISION}

The {{count}} classes of transformers' image-text-to-text mapping, {{trains}} of which train. They learn from
[pairs about images](guides/vision.md), and from text alone, as any other.

- **Images**: yes, if it was trained here on pairs about images with a processor of its own class; or why that was not
  tried, which does not say that it would fail: a run looks whether its model sees the images before it begins.
- **Resume**: as above, with images where these were tried, else on text alone; every weight was moved before the
  checkpoint, the vision tower's too (`pytest tests/trainer/test_resume_vision_families.py --run-slow`).

"""


def page(families: Iterable[Family], vision: Iterable[VisionFamily]) -> str:
    families, vision = list(families), list(vision)
    layouts = Counter(family.layout for family in families if family.trains == "yes")
    text = _TEXT.format(
        version=transformers.__version__,
        count=len(families),
        trains=sum(layouts.values()),
        packed=layouts["shared"] + layouts["repeated"],
        times=MOST_TIMES,
    )
    trains = sum(family.resume == "bit for bit" for family in vision)
    vision_text = _VISION_TEXT.format(count=len(vision), trains=trains)
    return text + _table(_HEADINGS, families) + vision_text + _table(_VISION_HEADINGS, vision)


def _table(headings: dict[str, str], families: Iterable[Family | VisionFamily]) -> str:
    lines = [row([*headings.values()]), row(["---"] * len(headings)), *map(family_row, families)]
    return "\n".join(lines) + "\n"


def family_row(family: Family | VisionFamily) -> str:
    model_type, name, *cells = astuple(family)
    return row([f"`{model_type}`", f"`{name}`", *cells])


def cells_of(text: str, model_type: str) -> dict[str, str]:
    """A family's row of the page: field of :class:`family_survey.Family` -> cell."""
    return _cells_of(text.partition(_VISION)[0], model_type, _HEADINGS)


def vision_cells_of(text: str, model_type: str) -> dict[str, str]:
    """The same of a vision-language family: field of :class:`vision_survey.VisionFamily` -> cell."""
    return _cells_of(text.partition(_VISION)[2], model_type, _VISION_HEADINGS)


def _cells_of(text: str, model_type: str, headings: dict[str, str]) -> dict[str, str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| `{model_type}` | "))
    return dict(zip(headings, line[2:-2].split(" | "), strict=True))


def row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found = []
    for model_type in FAMILIES:
        found.append(replace(survey(model_type), resume=resume(model_type)))
        print(family_row(found[-1]), file=sys.stderr, flush=True)
    vision = [survey_vision(model_type) for model_type in VISION_FAMILIES]
    PAGE.write_text(page(found, vision), encoding="utf-8")


if __name__ == "__main__":
    main()
