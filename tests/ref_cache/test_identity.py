"""What the key of a reference cache says of a model, a tokenizer and a collator."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from families import family_template, tokenizer_with
from tiny_models import make_model
from toy_data import make_tokenizer, text_rows
from transformers import default_data_collator

from fastdpo.data import PreferenceCollator, prepare
from fastdpo.ref_cache.fingerprints import (
    base_weights,
)
from fastdpo.ref_cache.identity import reference_identity, row_words
from fastdpo.ref_cache.key import CacheKey

pytestmark = pytest.mark.usefixtures("one_thread")


def test_an_identity_names_types_and_cuts() -> None:
    model, tokenizer = make_model("llama", dtype=torch.bfloat16), make_tokenizer()
    collator = PreferenceCollator(0, max_length=77, truncation_mode="keep_end")
    found = reference_identity(model, base_weights(model), tokenizer, collator, "no")
    assert CacheKey(**found, num_completions=0, completions="").weights_dtype == "bfloat16"
    assert (found["compute_dtype"], found["max_length"], found["truncation_mode"]) == ("bfloat16", 77, "keep_end")
    assert found["masking"] == "fastdpo.data.PreferenceCollator"
    mixed = reference_identity(model.float(), {}, None, default_data_collator, "bf16")
    assert (mixed["weights_dtype"], mixed["compute_dtype"]) == ("float32", "bfloat16")
    assert (mixed["tokenizer"], mixed["chat_template"], mixed["max_length"]) == (None, None, None)
    assert mixed["masking"].endswith(".default_data_collator")


def test_the_day_is_part_of_it_where_the_chat_template_writes_it() -> None:
    model, collator = make_model("llama"), PreferenceCollator(0)

    def template(family: str, day: str | None) -> str:
        tokenizer = tokenizer_with(family_template(family))
        return reference_identity(model, {}, tokenizer, collator, "no", template_date=day)["chat_template"]

    assert template("granite", "2026-03-01") == f"{template('granite', None)}, on 2026-03-01"
    assert template("chatml", "2026-03-01") == template("chatml", None)


def test_rows_are_described_by_their_beginning() -> None:
    tokenizer = make_tokenizer()
    kept, _ = prepare(Dataset.from_list(text_rows(2)), tokenizer)
    assert "The sky over" in row_words(kept[0], tokenizer)
    assert row_words({"prompt_ids": [], "chosen_ids": [4, 5]}, None) == "it begins with the tokens [4, 5]"
