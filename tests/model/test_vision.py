"""Processors that were saved with models and adapters, and models that are loaded for images or for text."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from tiny_vision import make_processor, make_vision_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedTokenizerBase, ProcessorMixin

from fastdpo.model.adapters import load_adapter
from fastdpo.model.auto_class import auto_class_of
from fastdpo.model.vision import load_processing_class


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vision")
    make_vision_model("llava").save_pretrained(folder)
    make_processor("llava").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = AutoModelForImageTextToText.from_pretrained(folder)
    path = tmp_path_factory.mktemp("adapter")
    get_peft_model(base, LoraConfig(r=2, target_modules=r".*language_model.*q_proj")).save_pretrained(path)
    return path


def test_a_model_brings_its_processor(folder: Path, model: Path) -> None:
    assert isinstance(load_processing_class(str(folder), images=True), ProcessorMixin)
    assert isinstance(load_processing_class(str(folder), images=False), ProcessorMixin)
    assert isinstance(load_processing_class(str(model), images=False), PreTrainedTokenizerBase)


def test_an_adapter_has_its_own_or_its_bases(folder: Path, adapter: Path, tmp_path: Path) -> None:
    assert isinstance(load_processing_class(str(adapter), images=True), ProcessorMixin)
    own = tmp_path / "own"
    shutil.copytree(adapter, own)
    processor = make_processor("llava")
    processor.chat_template = "another"
    processor.save_pretrained(own)
    assert load_processing_class(str(own), images=True).chat_template == "another"


def test_without_a_processor(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bare = tmp_path / "bare"
    make_vision_model("llava").save_pretrained(bare)
    make_processor("llava").tokenizer.save_pretrained(bare)
    with pytest.raises((OSError, ValueError)):
        load_processing_class(str(bare), images=True)
    with caplog.at_level(logging.WARNING, "fastdpo"):
        logging.getLogger("fastdpo").propagate = True
        assert isinstance(load_processing_class(str(bare), images=False), PreTrainedTokenizerBase)
    assert "has no processor that can be loaded" in caplog.text


def test_which_class_a_model_is_loaded_as(folder: Path, model: Path, adapter: Path, tmp_path: Path) -> None:
    assert auto_class_of(str(folder), images=True) is AutoModelForImageTextToText
    assert auto_class_of(str(folder), images=False) is AutoModelForImageTextToText  # there is no other
    assert auto_class_of(str(model), images=False) is AutoModelForCausalLM
    assert auto_class_of(str(model), images=True) is AutoModelForCausalLM
    assert auto_class_of(str(tmp_path / "none"), images=True) is AutoModelForCausalLM
    loaded = load_adapter(str(adapter), images=True).get_base_model()
    assert type(loaded).__name__ == "LlavaForConditionalGeneration"
