"""fastdpo compare and fastdpo chat, on a tiny model, another one, and an adapter."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from tiny_models import make_model
from toy_data import assistant, chat_rows, make_tokenizer, user, write_jsonl

from fastdpo.commands.chat import Conversation
from fastdpo.commands.cli import main
from fastdpo.commands.side_by_side import Comparison, Side, compare, is_chat, sides_of, table_of, write_comparisons
from fastdpo.model.generation import Drawing, LoadedModel, Text, complete, encode_prompt

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = make_tokenizer()
LENGTH = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    names = {name: str(root / name) for name in ("base", "other", "adapter")}
    for seed, name in enumerate(("base", "other")):
        make_model("llama", seed=seed).save_pretrained(names[name])
        TOKENIZER.save_pretrained(names[name])
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    config.base_model_name_or_path = names["base"]
    adapter = get_peft_model(make_model("llama"), config)
    adapter.peft_config["default"].base_model_name_or_path = names["base"]
    adapter.save_pretrained(names["adapter"])
    return names


def expected(seed: int, prompt: Any, as_chat: bool = True) -> str:
    ids = encode_prompt(TOKENIZER, prompt, as_chat=as_chat)
    return complete(make_model("llama", seed=seed), TOKENIZER, [ids], Drawing(LENGTH))[0].text


def run(folders: dict[str, str], tmp_path: Path, *words: str) -> list[dict[str, Any]]:
    """What ``compare`` writes."""
    out = tmp_path / "new" / "out.jsonl"
    flags = ["--max_new_tokens", str(LENGTH), "--device", "cpu", "--out", str(out)]
    assert main(["compare", *words, *flags]) == 0
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


def test_two_models_side_by_side(folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = ["--model", folders["base"], "--model", folders["other"]]
    found = run(folders, tmp_path, *models, "--prompt", "The sky [bold]", "--prompt", "How many?")
    assert [line["prompt"] for line in found] == ["The sky [bold]", "How many?"]
    for line in found:
        texts = [side["text"] for side in line["completions"]]
        assert texts == [expected(0, line["prompt"]), expected(1, line["prompt"])] and texts[0] != texts[1]
        assert [side["model"] for side in line["completions"]] == [folders["base"], folders["other"]]
    said = capsys.readouterr().out
    assert "1. The sky [bold]" in said and "2. How many?" in said  # not taken for a style


def test_an_adapter_stands_beside_its_base(folders: dict[str, str], tmp_path: Path) -> None:
    (line,) = run(folders, tmp_path, "--model", folders["adapter"], "--prompt", "How many?", "--format", "text")
    base, trained = line["completions"]
    assert base == {
        "model": f"{folders['base']} (base)",
        "text": expected(0, "How many?", False),
        "ended": base["ended"],
    }
    assert trained["model"] == folders["adapter"] and trained["text"] != base["text"]


def test_texts_of_data_stay_as_they_are_and_typed_ones_become_messages(folders: dict[str, str], tmp_path: Path) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "How many?"}, *chat_rows(2), *chat_rows(2)])
    listed = tmp_path / "list.txt"
    listed.write_text("How many?\n")
    models = ["--model", folders["base"], "--model", folders["other"]]
    found = run(folders, tmp_path, *models, "--prompts", str(pairs), "--limit", "2")
    assert [line["completions"][0]["text"] for line in found] == [
        expected(0, "How many?", as_chat=False),
        expected(0, chat_rows(1)[0]["prompt"]),
    ]
    (line,) = run(folders, tmp_path, *models, "--prompts", str(listed))
    assert line["completions"][0]["text"] == expected(0, "How many?", as_chat=True)


def test_draws_differ_by_seed_and_repeat(folders: dict[str, str], tmp_path: Path) -> None:
    words = ["--model", folders["base"], "--model", folders["other"], "--prompt", "x", "--temperature", "1"]
    first = run(folders, tmp_path, *words)
    assert run(folders, tmp_path, *words) == first
    assert run(folders, tmp_path, *words, "--seed", "5")[0]["completions"] != first[0]["completions"]


def test_one_model_is_in_memory_at_a_time() -> None:
    alive: list[str] = []

    class Model(LoadedModel):
        def __del__(self) -> None:
            alive.remove(self.name)

    def load(name: str) -> LoadedModel:
        assert alive == []
        alive.append(name)
        return Model(name, make_model("llama", seed=len(name)), TOKENIZER, None)

    sides = [Side("one", "a"), Side("two", "bb")]
    comparisons = compare(sides, ["x", [user("y")]], Drawing(3), load)
    assert [len(comparison.texts) for comparison in comparisons] == [2, 2]
    assert alive == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "./nowhere", "--model", "b", "--prompt", "x"], "--model ./nowhere: no such folder"),
        (["--model", "{base}", "--prompt", "x"], "is no adapter, so there is nothing beside it: give --model twice"),
        (["--model", "{base}", "--model", "no-such-model", "--prompt", "x"], "--model no-such-model: "),
        (["--model", "{base}", "--model", "{other}"], "a prompt is needed"),
        (["--model", "{base}", "--prompt", "x", "--device", "nonsense"], "--device nonsense: "),
        (["--model", "{base}", "--model", "{other}", "--prompts", "nowhere.txt"], "nowhere.txt: No such file"),
        (["--model", "{base}", "--model", "{other}", "--prompt", "x", "--limit", "3"], "--limit would have no effect"),
        (["--model", "{base}", "--model", "{other}", "--prompt", "x", "--out", "a.pdf"], "ends with .md or .jsonl"),
        (["--model", "{base}", "--model", "{other}", "--prompt", "x", "--max_new_tokens", "0"], "max_new_tokens is 0"),
        (["--model", "{base}", "--model", "{other}", "--prompt", "x " * 300], "positions reach to 256"),
    ],
)
def test_bad_input(words: list[str], message: str, folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--device", "cpu", *(word.format(**folders) for word in words)]) == 2
    error = capsys.readouterr().err
    assert "fastdpo compare: error: " in error and message in error and "Traceback" not in error


def test_help_of_both(capsys: pytest.CaptureFixture[str]) -> None:
    for command, words in (("compare", ("--prompts", "--out", "examples:")), ("chat", ("--model", "/reset"))):
        assert main([command, "--help"]) == 0
        said = capsys.readouterr().out
        assert all(word in said for word in words)
        assert main([command]) == 2
        assert "--model" in capsys.readouterr().err


def test_markdown_keeps_texts_as_they_stand(tmp_path: Path) -> None:
    text = "```\n# no heading\n```` <b>"
    comparison = Comparison([user("hi"), assistant(text)], [Text(text, True, 3), Text("", False, 4)])
    path = tmp_path / "c.md"
    write_comparisons(path, [comparison], [Side("a", "a"), Side("b", "b")], {"seed": 0})
    written = path.read_text(encoding="utf-8")
    assert written.count(f"`````text\n{text}\n`````") == 1
    assert f"user: hi\nassistant: {text}" in written and "**b** (cut)" in written


def test_tables_show_what_was_cut_and_what_is_empty() -> None:
    console = Console(width=60, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(
        table_of(Comparison("p", [Text("", True, 0), Text("[red]x", False, 3)]), [Side("[a]", ""), Side("b", "")])
    )
    said = console.export_text()
    assert "(nothing)" in said and "[red]x … (cut)" in said and "[a]" in said


# --------------------------------------------------------------------------------------------------------------------
# Chat
# --------------------------------------------------------------------------------------------------------------------


def make_conversation(prompt_format: str = "auto") -> Conversation:
    return Conversation(Side("base", ""), LoadedModel("base", make_model("llama"), TOKENIZER, None), prompt_format)


def test_a_conversation_goes_on_from_what_was_said() -> None:
    conversation = make_conversation()
    first = conversation.answer("How many?", Drawing(LENGTH))
    assert first.text == expected(0, [user("How many?")])
    conversation.remember("How many?", first)
    second = conversation.answer("And now?", Drawing(LENGTH))
    assert second.text == expected(0, [user("How many?"), assistant(first.text), user("And now?")])
    conversation.reset()
    assert conversation.answer("How many?", Drawing(LENGTH)) == first


def test_without_a_template_each_line_stands_alone() -> None:
    conversation = make_conversation("text")
    first = conversation.answer("How many?", Drawing(LENGTH))
    assert first.text == expected(0, "How many?", as_chat=False)
    conversation.remember("How many?", first)
    assert conversation.answer("How many?", Drawing(LENGTH)) == first
    bare = make_tokenizer()
    bare.chat_template = None
    assert not is_chat(LoadedModel("x", make_model("llama"), bare, None), "auto")


def test_chat_reads_lines_and_answers_in_columns(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["How many?", "", "x " * 300, "/reset", "How many?"])

    def read(*_: Any) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    words = ["chat", "--model", folders["base"], "--model", folders["other"], "--max_new_tokens", str(LENGTH)]
    assert main([*words, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert said.count("How many?") == 2  # the titles of two answers
    assert "positions reach to 256" in said  # and the conversation goes on
    assert len(re.findall("┏.*┳.*┓", said)) == 2


def test_sides(folders: dict[str, str]) -> None:
    base = Side(f"{folders['base']} (base)", folders["adapter"], adapter_off=True)
    assert sides_of([folders["adapter"]]) == [base, Side(folders["adapter"], folders["adapter"])]
    assert sides_of([folders["base"]]) == [Side(folders["base"], folders["base"])]
    assert [side.adapter_off for side in sides_of([folders["base"], folders["adapter"]])] == [False, False]
