"""Pairs about images on two processes: the losses of one."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from ranks import launched, on_ranks
from tiny_vision import make_processor, make_vision_model, vision_rows
from trainer_runs import config

from fastdpo.trainer import DPOTrainer
from fastdpo.trainer.engines import refuse_mixed_images

FAMILY, PAIRS = "qwen2_5_vl", 4  # pairs a step, on all processes


def losses(*, ranks: int, use_cpu: bool = True) -> list[float]:
    options: dict[str, Any] = {"max_steps": 3, "max_length": None, "gradient_checkpointing": False, "bf16": False}
    options |= {"per_device_train_batch_size": PAIRS // ranks, "report_to": "none", "use_cpu": use_cpu}
    trainer = DPOTrainer(
        make_vision_model(FAMILY),
        make_vision_model(FAMILY),
        config(Path(tempfile.mkdtemp()), **options),
        train_dataset=Dataset.from_list(vision_rows(8)),
        processing_class=make_processor(FAMILY),
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def on_a_rank() -> dict[str, Any]:
    with launched():
        return {"sharded": losses(ranks=2, use_cpu=False)}


@pytest.mark.slow
def test_sharded_models_have_the_losses_of_one_process(tmp_path: Path) -> None:
    expected = losses(ranks=1)
    for found in on_ranks(on_a_rank, 2, tmp_path):
        assert found["sharded"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_batches_without_images_stop_nobody(tmp_path: Path) -> None:
    """DDP, which waits for the gradients of all parameters unless it is told that there may be none."""
    make_vision_model("llava").save_pretrained(tmp_path / "model")
    make_processor("llava").save_pretrained(tmp_path / "model")
    lines = []
    for i, row in enumerate(vision_rows(8)):
        (image,) = row["images"]
        image.save(tmp_path / f"{i}.png")
        lines.append(json.dumps(row | {"images": [f"{i}.png"] if i % 2 else []}))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = (
        f"-m fastdpo train --model_name_or_path {tmp_path}/model --dataset_name {tmp_path}/pairs.jsonl --max_steps 3"
    )
    words += " --use_cpu --report_to none --save_strategy no --report_pairs 0 --report_samples 0 --logging_steps 1"
    found = []
    for ranks in (1, 2):
        more = f"--per_device_train_batch_size {PAIRS // ranks} --output_dir {tmp_path}/out-{ranks}"
        launcher = f"-m torch.distributed.run --standalone --nproc_per_node {ranks}" if ranks > 1 else ""
        subprocess.run([sys.executable, *launcher.split(), *words.split(), *more.split()], check=True)
        log = json.loads((tmp_path / f"out-{ranks}" / "trainer_state.json").read_text())["log_history"]
        found.append([entry["loss"] for entry in log if "loss" in entry])
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_rows_without_images_are_refused_where_processes_would_wait() -> None:
    refuse_mixed_images(None)
    with pytest.raises(NotImplementedError, match="rows without images among .* are not supported with FSDP"):
        refuse_mixed_images("FSDP")
