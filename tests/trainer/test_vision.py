"""Runs on pairs about images: the reference, adapters, parts of a batch, resume, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Image, IterableDataset, List
from peft import LoraConfig
from tiny_vision import make_image, make_processor, make_vision_model, vision_rows
from trainer_runs import GradientRecorder, config
from transformers import LlavaForConditionalGeneration

from fastdpo.data import streaming
from fastdpo.data.files import DataError, load_preferences, stream_preferences
from fastdpo.ref_cache import RefCacheError
from fastdpo.trainer import DPOTrainer
from fastdpo.trainer import setup as begun

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")


@pytest.fixture(scope="module")
def processor() -> Any:
    return make_processor("llava")


@pytest.fixture(scope="module")
def model() -> Any:
    return make_vision_model("llava")


def mixed_rows(count: int = 8) -> list[dict[str, Any]]:
    rows = vision_rows(count)
    rows[1]["images"] = []
    rows[2]["images"] = [*rows[2]["images"], make_image(99)]
    return rows


def trainer_of(folder: Path, model: Any, processor: Any, *, rows: Any = None, **options: Any) -> DPOTrainer:
    rows = mixed_rows() if rows is None else rows
    named = ("ref_model", "eval_dataset", "peft_config", "callbacks")
    arguments = {name: options.pop(name) for name in named if name in options}
    return DPOTrainer(
        model=model if isinstance(model, str) else copy.deepcopy(model),
        args=config(folder, **({"gradient_checkpointing": False, "report_to": "none"} | options)),
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        processing_class=processor,
        **arguments,
    )


def losses(trainer: DPOTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_cached_reference_is_the_reference(tmp_path: Path, model: Any, processor: Any) -> None:
    whole = trainer_of(tmp_path / "a", model, processor, max_steps=4)
    whole.train()
    cached = [
        trainer_of(tmp_path / name, model, processor, max_steps=4, ref_cache=str(tmp_path / "cache")) for name in "bc"
    ]
    assert [trainer.reference_splits["train"].rows_read for trainer in cached] == [0, 8]
    for trainer in cached:
        assert trainer.ref_model is None
        trainer.train()
        # Batches of the cache are of like lengths: sums in another order.
        assert losses(trainer) == pytest.approx(losses(whole), rel=1e-5)


def test_a_cache_of_other_images_is_refused(tmp_path: Path, model: Any, processor: Any) -> None:
    trainer_of(tmp_path / "a", model, processor, ref_cache=str(tmp_path / "cache"))
    rows = mixed_rows()
    rows[3]["images"] = [make_image(77, rows[3]["images"][0].size)]
    with pytest.raises(RefCacheError, match="a completion of kept row 3"):
        trainer_of(tmp_path / "b", model, processor, rows=rows, ref_cache=str(tmp_path / "cache"))


def test_a_cache_of_another_image_processor_is_refused(tmp_path: Path, model: Any, processor: Any) -> None:
    trainer_of(tmp_path / "a", model, processor, ref_cache=str(tmp_path / "cache"))
    other = make_processor("llava")
    other.image_processor.image_mean = [0.5, 0.5, 0.5]
    with pytest.raises(RefCacheError, match="the tokenizer"):
        trainer_of(tmp_path / "b", model, other, ref_cache=str(tmp_path / "cache"))


def test_a_resumed_run_is_the_unbroken_one(tmp_path: Path, model: Any, processor: Any) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "gradient_checkpointing": True}
    whole = trainer_of(tmp_path / "whole", model, processor, **options)
    whole.train()
    resumed = trainer_of(tmp_path / "again", model, processor, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(whole) and len(set(losses(whole))) == 4
    for (name, got), expected in zip(
        resumed.model.state_dict().items(), whole.model.state_dict().values(), strict=True
    ):
        assert torch.equal(got, expected), name


def test_an_adapter_on_the_text_leaves_the_vision_tower(tmp_path: Path, model: Any, processor: Any) -> None:
    lora = LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    trainer = trainer_of(tmp_path, model, processor, peft_config=lora, max_steps=3)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(torch.log(torch.tensor(2.0)).item(), rel=1e-6)
    assert losses(trainer)[-1] != losses(trainer)[0]
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert trained and all("language_model" in name for name in trained)


def test_the_projector_may_be_trained_alone(tmp_path: Path, model: Any, processor: Any) -> None:
    frozen = copy.deepcopy(model).requires_grad_(False)
    frozen.model.multi_modal_projector.requires_grad_(True)
    trainer = trainer_of(tmp_path, frozen, processor)
    trainer.train()
    before, after = model.state_dict(), trainer.model.state_dict()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed and all("multi_modal_projector" in name for name in changed)


def test_a_batch_in_parts_has_its_gradients(tmp_path: Path, model: Any, processor: Any) -> None:
    recorders = [GradientRecorder(), GradientRecorder()]
    for name, recorder, budget in zip("ab", recorders, (None, 150), strict=True):
        trainer_of(
            tmp_path / name,
            model,
            processor,
            callbacks=[recorder],
            max_tokens_per_batch=budget,
            per_device_train_batch_size=4,
            max_grad_norm=0.0,
            optim="sgd",
            learning_rate=1e-4,
        ).train()
    for whole, parts in zip(recorders[0].steps, recorders[1].steps, strict=True):
        assert whole.keys() == parts.keys()
        largest = max(float(gradient.norm()) for gradient in whole.values())
        for name, gradient in whole.items():
            difference = float((parts[name] - gradient).norm())
            assert difference <= 1e-4 * float(gradient.norm()) + 1e-6 * largest, name


def test_a_model_by_name_brings_its_processor(tmp_path: Path, model: Any, processor: Any) -> None:
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    given = trainer_of(tmp_path / "a", model, processor)
    named = trainer_of(tmp_path / "b", str(tmp_path / "model"), None)
    assert isinstance(named.model, LlavaForConditionalGeneration)
    for trainer in (given, named):
        trainer.train()
    assert losses(named) == losses(given)
    named.save_model(str(tmp_path / "out"))
    again = trainer_of(tmp_path / "c", str(tmp_path / "out"), None)
    assert type(again.processing_class) is type(processor)
    assert again.processing_class.chat_template == processor.chat_template


def test_images_are_evaluated_on_too(tmp_path: Path, model: Any, processor: Any) -> None:
    """Also where the training set has none."""
    rows = vision_rows(4)
    text = [{**row, "images": []} for row in rows]
    first = trainer_of(tmp_path / "a", model, processor, rows=text, eval_dataset=Dataset.from_list(rows))
    second = trainer_of(tmp_path / "b", model, processor, rows=rows, eval_dataset=Dataset.from_list(rows))
    assert first.evaluate()["eval_logps/chosen"] == pytest.approx(second.evaluate()["eval_logps/chosen"], rel=1e-6)


def test_a_model_is_loaded_for_the_images_of_an_evaluation(
    tmp_path: Path, model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some models have a class for text alone, too."""
    loaded_for = []

    def spy(*args: Any, images: bool, **kwargs: Any) -> Any:
        loaded_for.append(images)
        return make_models(*args, images=images, **kwargs)

    make_models = begun.make_models
    monkeypatch.setattr(begun, "make_models", spy)
    rows = vision_rows(4)
    text = [{**row, "images": []} for row in rows]
    for evaluated in (None, Dataset.from_list(rows), {"a": Dataset.from_list(text), "b": Dataset.from_list(rows)}):
        trainer_of(tmp_path, model, processor, rows=text, eval_dataset=evaluated)
    assert loaded_for == [False, True, True]


def test_text_alone_is_packed(tmp_path: Path, model: Any, processor: Any) -> None:
    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in vision_rows(4)]
    assert trainer_of(tmp_path, model, processor, rows=rows).packing.layout == "shared"


def test_packed_rows_of_images_are_refused(tmp_path: Path, model: Any, processor: Any) -> None:
    for packing in ("shared", "repeated"):
        with pytest.raises(NotImplementedError, match=f"packing is '{packing}', but rows have images"):
            trainer_of(tmp_path, model, processor, packing=packing)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Rows as sets on the Hub have them, of which some have no image, some two, and of one it cannot be read."""
    rows = mixed_rows(24)
    kept = Dataset.from_list(rows).cast_column("images", List(Image(decode=False)))
    broken = kept.map(
        lambda row, i: row | ({"images": [{"bytes": b"none", "path": None}]} if i == 5 else {}), with_indices=True
    )
    folder = tmp_path_factory.mktemp("stored")
    broken.to_parquet(folder / "train.parquet")
    return str(folder)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stream_of_images_trains_as_its_rows_do(
    tmp_path: Path, model: Any, processor: Any, stored: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "PICTURED_CHUNK", 7)
    options: dict[str, Any] = {"max_steps": 5, "per_device_train_batch_size": 4, "dataloader_num_workers": workers}
    found = []
    for rows in (load_preferences(stored), stream_preferences(stored)):
        trainer = trainer_of(tmp_path, model, processor, rows=rows, train_sampling_strategy="sequential", **options)
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == found[1] and len(set(found[0])) == 5


def test_a_stream_of_images_is_gone_on_with_where_it_was(
    tmp_path: Path, model: Any, processor: Any, stored: str
) -> None:
    def run(folder: str, resume: str | None = None) -> DPOTrainer:
        rows = stream_preferences(stored).shuffle(seed=3, buffer_size=8)
        options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        trainer = trainer_of(tmp_path / folder, model, processor, rows=rows, **options)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole = run("whole")
    resumed = run("again", str(tmp_path / "whole" / "checkpoint-2"))
    assert losses(resumed) == losses(whole) and len(set(losses(whole))) == 4
    for (name, got), expected in zip(
        resumed.model.state_dict().items(), whole.model.state_dict().values(), strict=True
    ):
        assert torch.equal(got, expected), name


def test_a_stream_that_has_images_late_or_none_to_look_at_is_refused(
    tmp_path: Path, model: Any, processor: Any
) -> None:
    rows = vision_rows(18)
    for row in rows[:-1]:
        row["images"] = []
    with pytest.raises(DataError, match="none of the first 16 had any"):
        trainer_of(tmp_path, model, processor, rows=Dataset.from_list(rows).to_iterable_dataset())
    rows[0]["images"], rows[-1]["images"] = [{"bytes": b"none", "path": None}], []
    with pytest.raises(DataError, match="a model is looked at with one"):
        trainer_of(tmp_path, model, processor, rows=IterableDataset.from_generator(lambda: iter(rows)))


def test_images_cannot_be_cut_away(tmp_path: Path, model: Any, processor: Any) -> None:
    with pytest.raises(ValueError, match="'keep_end', which would cut images"):
        trainer_of(tmp_path, model, processor, truncation_mode="keep_end")
    short = trainer_of(tmp_path, model, processor, max_length=48)
    assert short.data_summaries["train"].dropped["prompt_too_long"] > 0
    short.train()


def test_a_tokenizer_alone_is_refused(tmp_path: Path, model: Any, processor: Any) -> None:
    with pytest.raises(DataError, match="given with a tokenizer alone"):
        trainer_of(tmp_path, model, processor.tokenizer)
