"""The table in docs/models.md is what the code does, and no layout that is taken is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from family_survey import MOST_TIMES, bf16_errors, scorer_of, survey, truth
from family_truth import laid_out, made_up_rows
from models_page import PAGE, cells_of, family_row
from tiny_families import FAMILIES, NOT_MADE, make_family

from fastdpo.model.model_check import check_causal
from fastdpo.model.packing_choice import choose_packing
from fastdpo.model.randomness import disable_dropout

CPU = torch.device("cpu")

# Of the most used, one of each kind.
DOZEN = [
    "llama",
    "qwen2",
    "qwen3_moe",
    "mistral",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt2",
    "mixtral",
    "gpt_oss",
    "deepseek_v3",
    "falcon_h1",
    "bert",
]
OTHERS = [model_type for model_type in FAMILIES if model_type not in DOZEN]
HOW = "; python tests/support/models_page.py writes the page"

pytestmark = pytest.mark.usefixtures("one_thread")


def rarely(values: list[str]) -> list[object]:
    return [pytest.param(value, marks=pytest.mark.families) for value in values]


def test_the_page_is_of_this_version_and_names_every_class():
    text = PAGE.read_text(encoding="utf-8")
    assert f"transformers {transformers.__version__}:" in text, f"of another version of transformers{HOW}"
    assert [model_type for model_type in FAMILIES if f"\n| `{model_type}` | " not in text] == []


@pytest.mark.parametrize("model_type", [*DOZEN, *rarely(OTHERS)])
def test_the_table_is_what_the_code_does(model_type):
    text = PAGE.read_text(encoding="utf-8")
    # What is said of a resumed run is compared where that is run, by tests/trainer/test_resume_families.py.
    found = replace(survey(model_type), resume=cells_of(text, model_type)["resume"])
    assert family_row(found) in text.splitlines(), HOW


@pytest.mark.families
@pytest.mark.parametrize("weights", ["new", "five times", "trained"])
@pytest.mark.parametrize("length", [4, 8, 64])
@pytest.mark.parametrize("model_type", [m for m in FAMILIES if m not in NOT_MADE])
def test_no_layout_that_is_taken_is_wrong(model_type, length, weights):
    options = {"length": length, "scale": 5.0 if weights == "five times" else 1.0, "trained": weights == "trained"}
    chosen = make_family(model_type, **options)
    disable_dropout(chosen)
    try:
        scorer = scorer_of(chosen)
        check_causal(scorer, CPU, torch.float32)
    except NotImplementedError:
        return  # refused
    packing = choose_packing("auto", [scorer], obstacles={}, max_length=1024, device=CPU)
    if packing.layout == "padded":
        return
    rows = made_up_rows()
    model, true = truth(model_type, rows, **options)
    found = laid_out(scorer_of(model), packing.layout, packing.backend, rows)
    worst = max(float((a - b).abs().max()) for a, b in zip(found, true, strict=True))
    # Where parts of a model have no float64, rounding is float32's; where it is enlarged, so is that of padded rows.
    padded = laid_out(scorer_of(model), "padded", None, rows)
    rounding = max(float((a - b).abs().max()) for a, b in zip(padded, true, strict=True))
    assert worst <= max(1e-9 if model.dtype == torch.float64 else 1e-4, 8 * rounding)
    if length == 64:
        packed_error, padded_error = bf16_errors(model_type, packing, **options)
        assert packed_error <= MOST_TIMES * padded_error
