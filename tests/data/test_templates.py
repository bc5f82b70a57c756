"""A chat template as transformers renders it, on a day that is given."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES, family_template, tokenizer_with, trl_templates
from toy_data import assistant, user

from fastdpo.data.templates import plain, read_template, template_of, writes_date
from fastdpo.data.terms import DataError

DAY = datetime.date(2026, 3, 1)
CHAT = [user("Why?"), assistant("So."), user("And?")]


def test_the_day_is_the_one_that_is_given() -> None:
    dated = {name for name in FAMILIES if writes_date(tokenizer_with(family_template(name)))}
    assert dated == {"llama3_dated", "harmony", "granite"}
    text = template_of(tokenizer_with(family_template("granite")), None, DAY).bind(None, {}).render(CHAT)
    assert "Today's date: March 01, 2026." in text
    assert not writes_date(None)


def test_a_transformers_that_compiles_templates_otherwise_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("transformers.utils.chat_template_utils._compile_jinja_template")
    with pytest.raises(ImportError, match=r"transformers \d.* compiles chat templates in another way"):
        template_of(tokenizer_with("seen nowhere else"), None, DAY)


def test_a_template_under_several_names() -> None:
    tokenizer = tokenizer_with(family_template("chatml"))
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    tokenizer.chat_template = {"default": "plain", "tool_use": "{{ strftime_now('%Y') }}"}
    assert template_of(tokenizer, None, DAY).bind(None, {}).render(CHAT) == "plain"
    assert template_of(tokenizer, [{}], DAY).bind([{}], {}).render(CHAT) == "2026"
    assert writes_date(tokenizer)


def test_messages_as_transformers_hands_them_on() -> None:
    messages = [
        {"role": "assistant", "content": None, "thinking": "hm", "tool_calls": None},
        {"role": "assistant", "content": "x", "reasoning_content": "a", "reasoning": "b"},
        user("y"),
    ]
    assert plain(messages, "row 0") == [
        {"role": "assistant", "thinking": "hm", "reasoning_content": "hm"},
        {"role": "assistant", "content": "x", "reasoning_content": "a", "reasoning": "b", "thinking": "a"},
        user("y"),
    ]


def test_blocks_that_mark_answers() -> None:
    bound = template_of(tokenizer_with(family_template("marked")), None, DAY).bind(None, {})
    assert bound.template.marks_answers
    text, spans = bound.render_marked(CHAT)
    assert text == bound.render(CHAT)
    assert [text[start:end] for start, end in spans] == ["So.<|im_end|>"]


def test_templates_by_name(tmp_path: Path) -> None:
    (tmp_path / "mine.jinja").write_text("{{ messages }}")
    assert read_template(str(tmp_path / "mine.jinja")) == "{{ messages }}"
    assert read_template("glm4moe_training") == trl_templates()["glm4moe_training"]
    with pytest.raises(DataError, match="No chat template 'nothing': .*one of TRL's: .*glm4moe_training"):
        read_template("nothing")


@pytest.mark.parametrize("value", [datetime.date(2024, 5, 1), b"x", {1, 2}])
def test_values_that_json_does_not_have(value: Any) -> None:
    with pytest.raises(DataError, match="row 3: there is .* in it, which JSON has no form for"):
        plain([user("a") | {"tool_calls": [{"arguments": {"x": [value]}}]}], "row 3")
