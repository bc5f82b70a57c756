"""That padding changes what a model says of a sequence is said."""

from __future__ import annotations

import pytest
import torch
from family_survey import scorer_of
from tiny_families import make_family

from fastdpo.model.padding_check import dependence_on_padding

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


def words_of(model_type: str, max_length: int | None, dtype: torch.dtype, **options: object) -> str | None:
    model = make_family(model_type, trained=True, dtype=dtype, **options)
    return dependence_on_padding(scorer_of(model), max_length, CPU, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_that_ranks_padding_with_tokens_is_named(dtype):
    """Doge keeps the best keys of a row that has more than so many, and takes padding for some of them."""
    words = words_of("doge", 1024, dtype, length=64)
    assert words is not None
    assert "model_type 'doge'" in words
    assert "log-probabilities of 152 tokens moved by" in words
    assert words_of("doge", 60, dtype, length=64) is None  # no sequence is so long


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("model_type", ["mamba", "bloom", "mixtral", "bamba", "falcon", "gemma2", "deepseek_v4"])
def test_models_that_do_not_are_not(model_type, dtype):
    assert words_of(model_type, None, dtype) is None


@pytest.mark.parametrize("max_length", [2, 8, 1024, None])
def test_no_position_is_used_that_the_model_has_not(max_length):
    """OPT's kind has 1,024 positions in a table."""
    assert words_of("opt", max_length, torch.float32, length=600) is None
    assert words_of("whisper", max_length, torch.float32) is None
