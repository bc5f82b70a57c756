"""The commands on pairs about images that lie in files beside them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_vision import make_image, make_processor, make_vision_model, vision_rows

from fastdpo.commands.cli import main
from fastdpo.commands.prompts import read_prompts
from fastdpo.data.files import DataError
from fastdpo.report.snapshot import Snapshot

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its processor, pairs, and their images; one of these is missing."""
    folder = tmp_path_factory.mktemp("vision")
    make_vision_model("llava").save_pretrained(folder / "model")
    make_processor("llava").save_pretrained(folder / "model")
    (folder / "pictures").mkdir()
    lines = []
    for i, row in enumerate(vision_rows(10)):
        make_image(i).save(folder / "pictures" / f"{i}.png")
        names = [f"pictures/{'lost' if i == 4 else i}.png"] if i % 3 else []
        lines.append(json.dumps(row | {"images": names}))
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_check_data_knows_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check-data", str(folder / "pairs.jsonl"), "--model_name_or_path", str(folder / "model")]) == 0
    out = capsys.readouterr().out
    assert "9 of 10 pairs can be trained on" in out
    assert "an image cannot be read" in out and "lost.png" in out
    assert "with images" in out and "in padded rows, two a pair" in out and "packed" not in out


def test_a_run_and_what_it_leaves(folder: Path, tmp_path: Path) -> None:
    words = f"train --model_name_or_path {folder}/model --dataset_name {folder}/pairs.jsonl --output_dir {tmp_path}/out"
    words += " --max_steps 2 --per_device_train_batch_size 2 --use_cpu --report_to none --save_strategy no"
    words += " --report_samples 1 --report_max_new_tokens 4"
    assert main(words.split()) == 0
    assert (tmp_path / "out" / "processor_config.json").exists()
    assert (tmp_path / "out" / "report.html").exists()
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "AutoModelForImageTextToText.from_pretrained(path)" in card
    assert "AutoProcessor.from_pretrained(path)" in card
    start = Snapshot.load(tmp_path / "out" / "report_start.json")
    # Pairs with images are scored; prompts without are completed.
    assert len(start.chosen_rewards) == 9
    assert len(start.samples) == 1 and "<image>" not in start.samples[0].prompt


def test_an_evaluation_sees_what_a_training_sees(folder: Path, tmp_path: Path) -> None:
    words = f"--model_name_or_path {folder}/model --dataset_name {folder}/pairs.jsonl --output_dir {tmp_path} --use_cpu"
    trained = "--dataset_test_split train --max_steps 1 --eval_on_start --eval_strategy steps --report_to none"
    trained += " --report_samples 0 --save_strategy no"
    assert main(["train", *words.split(), *trained.split()]) == 0
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    start = next(line for line in state["log_history"] if "eval_loss" in line)
    assert main(["eval", "--model", f"{folder}/model", *words.split(), "--resamples", "100"]) == 0
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["pairs"]["row"] == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    logps = found["slices"][0]["models"][0]["logps"]
    for side in ("chosen", "rejected"):
        assert logps[side]["value"] == pytest.approx(start[f"eval_logps/{side}"], rel=1e-5)


def test_prompts_with_images_are_not_completed(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2: the prompt has an image"):
        read_prompts(folder / "pairs.jsonl")
    (tmp_path / "p.jsonl").write_text(
        '{"prompt": [{"role": "user", "content": [{"type": "image", "url": "a.png"}]}]}\n'
    )
    with pytest.raises(DataError, match="line 1: the prompt has an image"):
        read_prompts(tmp_path / "p.jsonl")


def test_fixed_pairs_name_their_images(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["check-data", str(folder / "pairs.jsonl"), "--model_name_or_path", str(folder / "model")]
    assert main([*words, "--fix", str(tmp_path / "fixed.jsonl")]) == 0
    assert main(["check-data", str(tmp_path / "fixed.jsonl"), *words[2:]]) == 0
    assert "9 of 9 pairs can be trained on" in capsys.readouterr().out
