"""fastdpo.evaluation.run: the scores of models, adapters and references, by hand, and what cannot be evaluated."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import make_model
from toy_data import chat_rows, make_tokenizer, text_rows
from transformers import AutoModelForCausalLM, PreTrainedModel

from fastdpo.data.terms import DataError
from fastdpo.evaluation import loading
from fastdpo.evaluation.held_out import read_held_out
from fastdpo.evaluation.loading import Weights, in_turn
from fastdpo.evaluation.run import Evaluation, evaluate
from fastdpo.evaluation.scores import credits_of
from fastdpo.evaluation.scoring import ModelScorer
from fastdpo.evaluation.statistics import Resampling
from fastdpo.trainer import DPOConfig

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")

HOW = Resampling(draws=100)
TOKENIZER = make_tokenizer()
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "saved": {"modules_to_save": ["lm_head"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "dora": {"use_dora": True},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    names = {name: str(root / name) for name in ("base", "other", "gemma", *KINDS)}
    for seed, (name, kind) in enumerate((("base", "llama"), ("other", "llama"), ("gemma", "gemma2"))):
        make_model(kind, seed=seed).save_pretrained(names[name])
        TOKENIZER.save_pretrained(names[name])
    for seed, (name, options) in enumerate(KINDS.items()):
        torch.manual_seed(seed)
        config = LoraConfig(**({"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False} | options))
        adapter = get_peft_model(make_model("llama"), config)
        for parameter_name, parameter in adapter.named_parameters():
            if "modules_to_save" in parameter_name:
                parameter.data.mul_(1.5)
        adapter.peft_config["default"].base_model_name_or_path = names["base"]
        adapter.save_pretrained(names[name])
    return names


def args_of(tmp_path: Path, **options: Any) -> DPOConfig:
    return DPOConfig(str(tmp_path), **({"use_cpu": True, "max_length": 96, "disable_tqdm": True} | options))


def by_hand(model: PreTrainedModel | PeftModel, rows: Dataset) -> np.ndarray:
    """[rows, 2]: log-probabilities of chosen and rejected answers, one sequence at a time, from whole logits."""
    found = []
    for row in rows:
        sums = []
        for side in ("chosen", "rejected"):
            ids = torch.tensor([(row["prompt_ids"] + row[f"{side}_ids"])[:96]])
            with torch.no_grad():
                logps = model.double()(input_ids=ids).logits[0, :-1].log_softmax(-1)
            told = logps.gather(1, ids[0, 1:, None])[:, 0]
            sums.append(told[len(row["prompt_ids"]) - 1 :].sum().item())
        found.append(sums)
    return np.array(found)


def rows_with_a_source(count: int = 20) -> Dataset:
    return Dataset.from_list([{**row, "source": "ab"[i % 2]} for i, row in enumerate(text_rows(count))])


@pytest.fixture(scope="module")
def whole(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    models = [folders[name] for name in ("lora", "base", "saved", "other", "head", "dora")]
    args = args_of(tmp_path_factory.mktemp("out"))
    return evaluate(rows_with_a_source(), models, None, args, columns=["source"], how=HOW)


def test_scores_are_those_of_whole_logits(whole: Evaluation, folders: dict[str, str], tmp_path: Path) -> None:
    rows = read_held_out(rows_with_a_source(), TOKENIZER, args_of(tmp_path)).rows
    base = by_hand(AutoModelForCausalLM.from_pretrained(folders["base"]), rows)
    for model in whole.models:
        name = Path(model.source).name
        loaded = AutoModelForCausalLM.from_pretrained(folders["base" if name in KINDS else name])
        if name in KINDS:
            loaded = PeftModel.from_pretrained(loaded, model.source)
        expected = by_hand(loaded, rows)
        found = np.stack([model.scores.chosen_logps, model.scores.rejected_logps], 1)
        assert np.allclose(found, expected, rtol=2e-6, atol=2e-4), name
        assert (model.reference is not None) == (name in KINDS)
        if model.reference is not None:
            told = np.stack([model.reference.chosen_logps, model.reference.rejected_logps], 1)
            assert np.allclose(told, base, rtol=2e-6, atol=2e-4) and model.reference_label == folders["base"]
            rewards = 0.1 * ((expected - base) @ [1, -1])
            assert np.allclose(model.margins(0.1)["reward"], rewards, atol=1e-4)
    tokens = [len(row["chosen_ids"][: 96 - len(row["prompt_ids"])]) for row in rows]
    assert whole.models[0].scores.chosen_tokens.tolist() == tokens


def test_figures_are_of_these_scores(whole: Evaluation) -> None:
    first = whole.figures.slices[0]
    assert (first.pairs, first.prompts, first.few) == (20, 20, True)
    for model, figures in zip(whole.models, first.models, strict=True):
        for name, margins in model.margins(0.1).items():
            assert figures.accuracy[name].value == credits_of(margins).mean()
            assert figures.margin[name].value == pytest.approx(margins.mean())
        assert figures.logps["chosen_per_token"].value == pytest.approx(
            (model.scores.chosen_logps / model.scores.chosen_tokens).mean()
        )
    assert [comparison.models for comparison in first.comparisons][:3] == [(0, 1), (0, 2), (0, 3)]
    of_sources = [part for part in whole.figures.slices if part.by == "source"]
    assert [(part.name, part.pairs) for part in of_sources] == [("a", 10), ("b", 10)]
    margins = whole.models[3].margins(0.1)["likelihood"][1::2]
    assert of_sources[1].models[3].margin["likelihood"].value == pytest.approx(margins.mean())
    assert set(first.comparisons[0].accuracy) == {"likelihood", "per_token"}  # the base has no reward
    assert "reward" in first.comparisons[1].accuracy


def test_a_base_is_loaded_once_and_comes_back(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load = loading.load_model
    monkeypatch.setattr(loading, "load_model", lambda name, *a, **k: loaded.append(name) or load(name, *a, **k))
    base = folders["base"]
    wanted = [Weights(base, folders["saved"]), Weights(folders["other"]), Weights(base, folders["lora"]), Weights(base)]
    ids = torch.arange(1, 9)[None]
    seen = {}
    for weights, model in in_turn([*wanted, *wanted], args_of(tmp_path), images=False):
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        seen[weights] = model(input_ids=ids).logits
    assert loaded == [base, folders["other"]] and set(seen) == set(wanted)
    again = {
        weights: model(input_ids=ids).logits
        for weights, model in in_turn(wanted[::-1], args_of(tmp_path), images=False)
    }
    for weights in wanted:
        assert torch.equal(seen[weights], again[weights])
        alone = AutoModelForCausalLM.from_pretrained(weights.base)
        if weights.adapter:
            alone = PeftModel.from_pretrained(alone, weights.adapter)
        assert torch.equal(seen[weights], alone.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("options", [{"bias": "all"}, {"init_lora_weights": "pissa", "use_dora": False}])
def test_adapters_that_change_their_base_are_taken_off_with_it(options: dict[str, Any], tmp_path: Path) -> None:
    base, paths = str(tmp_path / "base"), [str(tmp_path / name) for name in ("a", "b")]
    make_model("qwen2").save_pretrained(base)  # which has biases
    for path in paths:
        config = LoraConfig(**({"r": 4, "target_modules": ["q_proj"]} | options))
        adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        with torch.no_grad():
            for name, parameter in adapter.named_parameters():
                if name.endswith(".bias") or "lora_B" in name:
                    parameter.add_(
                        0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(path)))
                    )
        adapter.peft_config["default"].base_model_name_or_path = base
        adapter.save_pretrained(path)
    ids = torch.arange(1, 9)[None]
    wanted = [Weights(base, paths[0]), Weights(base, paths[1]), Weights(base)]
    seen = {w: m(input_ids=ids).logits for w, m in in_turn(wanted, args_of(tmp_path), images=False)}
    for weights in wanted:
        alone = AutoModelForCausalLM.from_pretrained(base)
        if weights.adapter:
            alone = PeftModel.from_pretrained(alone, weights.adapter)
        assert torch.allclose(seen[weights], alone.eval()(input_ids=ids).logits, atol=1e-5)
    assert not torch.allclose(seen[wanted[0]], seen[wanted[2]], atol=1e-2)


def test_an_adapters_own_dropout_is_no_randomness_of_the_model(
    folders: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"r": 4, "target_modules": ["q_proj"], "lora_dropout": 0.5, "init_lora_weights": False}
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(folders["base"]), LoraConfig(**options))
    adapter.peft_config["default"].base_model_name_or_path = folders["base"]
    adapter.save_pretrained(tmp_path / "dropping")
    TOKENIZER.save_pretrained(tmp_path / "dropping")
    name = str(tmp_path / "dropping")
    found = evaluate(Dataset.from_list(text_rows(4)), [name], None, args_of(tmp_path), how=HOW)
    assert all("common beginnings once" in words for words in found.layouts.values()), found.layouts
    assert "random" not in caplog.text


def test_an_adapter_with_more_embeddings_than_its_base(folders: dict[str, str], tmp_path: Path) -> None:
    larger = AutoModelForCausalLM.from_pretrained(folders["base"])
    larger.resize_token_embeddings(400)
    saved = ["embed_tokens", "lm_head"]
    adapter = get_peft_model(larger, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=saved))
    adapter.peft_config["default"].base_model_name_or_path = folders["base"]
    adapter.save_pretrained(tmp_path / "larger")
    wanted = [Weights(folders["base"], str(tmp_path / "larger")), Weights(folders["base"], f"{folders['lora']}")]
    sizes = {
        w: m(input_ids=torch.arange(1, 9)[None]).logits.shape[-1]
        for w, m in in_turn(wanted, args_of(tmp_path), images=False)
    }
    assert [sizes[weights] for weights in wanted] == [400, 384]


def test_a_base_without_the_adapters_tokens_is_no_reference(folders: dict[str, str], tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<new>"]})
    larger = AutoModelForCausalLM.from_pretrained(folders["base"])
    larger.resize_token_embeddings(len(tokenizer))
    saved = ["embed_tokens", "lm_head"]
    adapter = get_peft_model(larger, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=saved))
    adapter.peft_config["default"].base_model_name_or_path = folders["base"]
    name = str(tmp_path / "larger")
    adapter.save_pretrained(name)
    tokenizer.save_pretrained(name)
    plain = evaluate(Dataset.from_list(text_rows(4)), [name], None, args_of(tmp_path), how=HOW)
    assert plain.models[0].reference is not None and not plain.notes
    rows = Dataset.from_list([{**row, "chosen": "<new>" + row["chosen"]} for row in text_rows(4)])
    for reference in (None, folders["base"]):
        found = evaluate(rows, [name], reference, args_of(tmp_path), how=HOW)
        assert set(found.models[0].margins(0.1)) == {"likelihood", "per_token"}
        assert any("has no rewards: its reference" in note for note in found.notes)
        assert list(found.layouts) == [name]
    # A model itself has to know its tokens.
    tokenizer.save_pretrained(tmp_path / "smaller")
    make_model("llama").save_pretrained(tmp_path / "smaller")
    with pytest.raises(DataError, match="the token '<new>' has the id 384"):
        evaluate(rows, [str(tmp_path / "smaller")], None, args_of(tmp_path), how=HOW)


def test_a_base_that_is_not_there_is_named_with_its_adapter(folders: dict[str, str], tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(folders["lora"], adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for base, told in (
        (str(tmp_path / "gone"), rf"the adapter {adapter} was trained on {tmp_path}/gone, and there is no such folder"),
        ("no-such/model", rf"{adapter} and its base, no-such/model, have no tokenizer that can be loaded: "),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
        with pytest.raises((ValueError, OSError), match=told):
            evaluate(Dataset.from_list(text_rows(2)), [str(adapter)], None, args_of(tmp_path), how=HOW)
    TOKENIZER.save_pretrained(adapter)
    with pytest.raises(
        OSError, match=rf"no-such/model, which the adapter {adapter} was trained on, cannot be loaded: "
    ):
        evaluate(Dataset.from_list(text_rows(2)), [str(adapter)], None, args_of(tmp_path), how=HOW)


def test_the_layout_and_the_batches_do_not_matter(folders: dict[str, str], tmp_path: Path) -> None:
    # Prompts that come again, and answers that do.
    rows = text_rows(4)
    rows = Dataset.from_list(rows + [{**rows[0], "rejected": " No."}, {**rows[0], "chosen": " Yes."}, *chat_rows(0)])
    found = []
    for options in (
        {},
        {"packing": "padded", "per_device_eval_batch_size": 2},
        {"packing": "repeated", "max_tokens_per_batch": 200},
    ):
        evaluation = evaluate(rows, [folders["other"]], folders["base"], args_of(tmp_path, **options), how=HOW)
        assert evaluation.figures.slices[0].prompts == 4 and evaluation.figures.slices[0].pairs == 6
        found.append(evaluation.models[0].margins(0.1)["reward"])
    assert np.allclose(found[0], found[1], atol=1e-4) and np.allclose(found[0], found[2], atol=1e-4)


def test_answers_in_groups(folders: dict[str, str], tmp_path: Path) -> None:
    groups = [
        {"prompt": "How many?", "completions": [" Seven.", " Eight.", " Seven."[::-1]], "scores": [3.0, 2.0, 1.0]},
        {"prompt": "And why?", "completions": [" So.", " Because."], "scores": [0.0, 1.0]},
    ]
    pairs = [
        ("How many?", " Seven.", " Eight."),
        ("How many?", " Seven.", ".neveS "),
        ("How many?", " Eight.", ".neveS "),
    ]
    pairs.append(("And why?", " Because.", " So."))
    rows = [dict(zip(("prompt", "chosen", "rejected"), pair, strict=True)) for pair in pairs]
    args = args_of(tmp_path)
    grouped = evaluate(Dataset.from_list(groups), [folders["other"]], folders["base"], args, how=HOW)
    apart = evaluate(Dataset.from_list(rows), [folders["other"]], folders["base"], args, how=HOW)
    assert grouped.places.rows.tolist() == [0, 0, 0, 1] and grouped.figures.slices[0].prompts == 2
    order = [
        np.argsort(e.models[0].scores.chosen_logps * 1e3 + e.models[0].scores.rejected_logps) for e in (grouped, apart)
    ]
    first, second = (
        np.stack(list(vars(e.models[0].scores).values()))[:, o] for e, o in zip((grouped, apart), order, strict=True)
    )
    assert np.allclose(first, second, atol=1e-4)


def test_models_of_other_tokenizers_share_what_both_keep(folders: dict[str, str], tmp_path: Path) -> None:
    other = make_tokenizer(330)
    make_model("llama", len(other), seed=5).save_pretrained(tmp_path / "small")
    other.save_pretrained(tmp_path / "small")
    rows = text_rows(6)
    # Beyond 96 tokens for one of them alone: the prompt leaves no room.
    lengths = [[len(t(text * 12)["input_ids"]) for t in (TOKENIZER, other)] for text in (row["prompt"] for row in rows)]
    assert all(one < two for one, two in lengths)
    times = next(
        n for n in range(1, 40) if len(TOKENIZER("grey " * n)["input_ids"]) < 96 <= len(other("grey " * n)["input_ids"])
    )
    rows[2]["prompt"] = "grey " * times
    models = [folders["other"], str(tmp_path / "small")]
    found = evaluate(Dataset.from_list(rows), models, None, args_of(tmp_path), how=HOW)
    assert found.places.rows.tolist() == [0, 1, 3, 4, 5] and "5 pairs that all of them keep" in found.notes[0]
    assert len(found.summaries) == 2 and all(len(model.scores.chosen_logps) == 5 for model in found.models)
    alone = evaluate(Dataset.from_list(rows).select([0, 1, 3, 4, 5]), models[1:], None, args_of(tmp_path), how=HOW)
    assert np.allclose(alone.models[0].scores.chosen_logps, found.models[1].scores.chosen_logps, atol=1e-4)
    groups = Dataset.from_list([{"prompt": "a", "completions": [" b", " c"], "scores": [0.0, 1.0]}])
    with pytest.raises(ValueError, match="different tokenizers"):
        evaluate(groups, models, None, args_of(tmp_path), how=HOW)


def test_what_cannot_be_evaluated(folders: dict[str, str], tmp_path: Path) -> None:
    rows, args, base = rows_with_a_source(4), args_of(tmp_path), folders["base"]
    for models, options, message in (
        ([base, base], {}, "named twice"),
        ([base, f"{base}/../base"], {}, "named twice"),
        (
            [base],
            {"columns": ["sauce"]},
            "no column 'sauce' to make parts by; there are prompt, chosen, rejected, source",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(rows, models, None, args, how=HOW, **options)
    broken = make_model("llama")
    broken.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    TOKENIZER.save_pretrained(tmp_path / "broken")
    with pytest.raises(ValueError, match=re.escape(f"the model {tmp_path / 'broken'} cannot be used")):
        evaluate(rows, [str(tmp_path / "broken")], None, args, how=HOW)
    make_model("llama", 300).save_pretrained(tmp_path / "few")
    TOKENIZER.save_pretrained(tmp_path / "few")
    with pytest.raises(ValueError, match="300"):
        evaluate(rows, [str(tmp_path / "few")], None, args, how=HOW)


def test_other_families(folders: dict[str, str], tmp_path: Path) -> None:
    found = evaluate(rows_with_a_source(4), [folders["gemma"]], None, args_of(tmp_path), how=HOW)
    rows = read_held_out(rows_with_a_source(4), TOKENIZER, args_of(tmp_path)).rows
    expected = by_hand(AutoModelForCausalLM.from_pretrained(folders["gemma"]), rows)
    assert np.allclose(found.models[0].scores.chosen_logps, expected[:, 0], rtol=2e-6, atol=2e-4)


def test_what_needs_less_memory_is_what_this_evaluation_has_to_spare(tmp_path: Path) -> None:
    few = ModelScorer(args_of(tmp_path, per_device_eval_batch_size=1, max_tokens_per_batch=64))._advice()
    assert [line.split(":")[0] for line in few] == ["--max_tokens_per_batch below 64", "--max_length below 96"]
    many = ModelScorer(args_of(tmp_path, per_device_eval_batch_size=4))._advice()
    assert [line.split(" ")[0].strip(":,") for line in many] == [
        "--max_tokens_per_batch",
        "--per_device_eval_batch_size",
        "--max_length",
    ]
