"""fastdpo.trainer.model_card: what the Hub reads, what a person reads, and that nobody's words are lost."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from huggingface_hub import ModelCard
from peft import LoraConfig
from tiny_models import make_model
from toy_data import make_tokenizer, text_rows

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.trainer import hub

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(folder: Path, *, lora: bool = False, base: str = "some-lab/tiny-llama") -> DPOTrainer:
    rows = datasets.Dataset.from_list(text_rows(6))
    model = make_model("llama")
    model.config._name_or_path = model.name_or_path = base
    trainer = DPOTrainer(
        model,
        args=DPOConfig(
            str(folder), max_steps=2, logging_steps=1, save_strategy="no", use_cpu=True, max_length=64, beta=0.25,
            report_to="none", disable_tqdm=True, eval_strategy="steps", eval_steps=2, per_device_train_batch_size=2,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM") if lora else None,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    return trainer


def test_a_card_for_a_model(tmp_path: Path) -> None:
    trainer = trained(tmp_path / "my-model")
    trainer.create_model_card(dataset_name="some-lab/pairs", tags="mine", language="en", license="apache-2.0")
    card = ModelCard.load(tmp_path / "my-model" / "README.md")
    assert card.data.to_dict() == {
        "base_model": "some-lab/tiny-llama",
        "datasets": ["some-lab/pairs"],
        "language": "en",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "fastdpo", "mine"],
    }
    assert "# my-model" in card.text and "loss `sigmoid`, beta 0.25" in card.text
    assert "[some-lab/pairs](https://huggingface.co/datasets/some-lab/pairs)" in card.text
    assert "| loss | 0.6931 | " in card.text and "| held out, at the end |" in card.text
    assert "| pairs a step | 2 |" in card.text and "| beta | 0.25 |" in card.text
    assert "margin_alpha" not in card.text and "sync_ref_model" not in card.text
    (code,) = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    exec(code.replace('"my-model"', repr(str(tmp_path / "my-model"))), {"print": lambda text: None})


def test_what_the_margin_was_to_exceed_and_where_the_reference_went(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    trainer.args.margin_alpha, trainer.args.sync_ref_model, trainer.args.ref_model_sync_steps = 0.5, True, 8
    trainer.create_model_card()
    text = (tmp_path / "README.md").read_text()
    assert "| margin_alpha | 0.5 |" in text and "| sync_ref_model | alpha 0.6, every 8 steps |" in text


def test_what_lies_on_this_machine_is_no_hub_id(tmp_path: Path) -> None:
    base = tmp_path / "secret-place" / "base"
    base.mkdir(parents=True)
    trainer = trained(tmp_path / "out", base=str(base))
    for name in ("pairs.jsonl", "./pairs", str(tmp_path / "pairs.parquet")):
        trainer.create_model_card(dataset_name=name)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model is None and card.data.datasets is None
    assert "`base`" in card.text and "secret-place" not in card.text


def test_pefts_card_is_extended_once(tmp_path: Path) -> None:
    trainer = trained(tmp_path / "adapter", lora=True)
    path = tmp_path / "adapter" / "README.md"
    theirs = ModelCard.load(path)
    for _ in range(2):
        trainer.save_model()  # PEFT writes its part again
        trainer.create_model_card()
    card = ModelCard.load(path)
    assert card.data.library_name == "peft" and card.data.base_model == "some-lab/tiny-llama"
    assert set(theirs.data.tags) | {"dpo", "fastdpo"} == set(card.data.tags)
    assert theirs.text.strip() in card.text
    assert card.text.count("# adapter\n") == 1 and card.text.count("## How to load it") == 1
    assert card.text.index("# adapter") < card.text.index("[More Information Needed]")
    assert "AutoPeftModelForCausalLM" in card.text and "| adapter: r | 2 |" in card.text


def test_somebodys_own_card_stays(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: mit\ntags: [poetry]\n---\n# My model\n\nDear | to me.\n", encoding="utf-8")
    trainer.create_model_card(model_name="name")
    card = ModelCard.load(path)
    assert card.text.lstrip().startswith("# My model\n\nDear | to me.\n")
    assert card.data.license == "mit" and card.data.tags == ["dpo", "fastdpo", "poetry"]


@pytest.mark.parametrize("text", [None, "# My model\n", "Dear\r\nto me.\r\n", "---\n\n---\nDear"])
def test_a_card_without_metadata_is_given_one_block_of_it(
    text: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    trainer = trained(tmp_path)
    path = tmp_path / "README.md"
    if text is not None:
        path.write_bytes(text.encode())
    trainer.create_model_card()
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "---" and lines.count("---") == 2
    assert ModelCard.load(path).data.tags == ["dpo", "fastdpo"]
    assert set((text or "").split()) <= set(" ".join(lines).split())
    assert "metadata block was not found" not in caplog.text


@pytest.mark.parametrize("lora", [False, True])
def test_it_goes_along_to_the_hub(lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trained(tmp_path, lora=lora)
    sent: dict[str, Any] = {}

    def upload(**kwargs: Any) -> None:
        sent.update(kwargs, card=ModelCard.load(Path(kwargs["folder_path"]) / "README.md"))

    monkeypatch.setattr(hub, "HfApi", lambda: SimpleNamespace(upload_folder=upload))
    trainer.hub_model_id = "me/my-model"
    trainer.args.hub_model_id = "me/my-model"
    trainer.push_to_hub(dataset_name="some-lab/pairs")
    assert sent["repo_id"] == "me/my-model"
    assert "# my-model" in sent["card"].text and sent["card"].data.datasets == ["some-lab/pairs"]
    assert {"dpo", "fastdpo"} <= set(sent["card"].data.tags)


def test_a_folders_name_is_a_name_whatever_is_in_it(tmp_path: Path) -> None:
    name = "a`b`*c* <img src=x onerror=y> [d](e)\n# f\x1b[2J\u202e"
    trainer = trained(tmp_path / "out", base=str(tmp_path / "base```x"))
    trainer.create_model_card(model_name=name, dataset_name="p`q.jsonl")
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    heading = r"# a\`b\`\*c\* \<img src=x onerror=y\> \[d\]\(e\)\\n\# f\\x1b\[2J\\u202e"
    assert [line for line in text.splitlines() if line.startswith("# ")] == [heading]
    assert "\x1b" not in text and "\u202e" not in text
    assert "```` base```x ````" in text and "`` p`q.jsonl ``" in text
    (code,) = re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    compile(code, "card", "exec")


@pytest.mark.parametrize("before", [None, "", "# Mine\n", "---\nlicense: mit\n---\n# Mine\n"])
def test_a_card_begins_with_one_block_of_metadata(before: str | None, tmp_path: Path) -> None:
    trainer = trained(tmp_path / "out")
    if before is not None:
        (tmp_path / "out" / "README.md").write_text(before)
    for _ in range(2):
        trainer.create_model_card()
        text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
        block, _, rest = text.removeprefix("---\n").partition("\n---\n")
        assert text.startswith("---\n") and "library_name: transformers" in block and "---" not in block
        assert not rest.lstrip().startswith("---") and rest.count("# Mine") == ("Mine" in (before or ""))
