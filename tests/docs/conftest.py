"""What the examples of pages find, and leave."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from loss_layer.peers import PEERS
from pages import CONTRIBUTING, blocks
from tiny_vision import make_processor, make_vision_model
from toy_data import text_rows, write_jsonl


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny vision-language model and its processor."""
    folder = tmp_path_factory.mktemp("vision")
    make_vision_model("llava").save_pretrained(folder)
    make_processor("llava").save_pretrained(folder)
    return folder


@pytest.fixture
def workplace(model: Path, vision_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that snippets and command lines run in, with the files that they speak of."""
    shutil.copytree(model, tmp_path / "my-model")
    shutil.copytree(vision_model, tmp_path / "my-vision-model")
    write_jsonl(tmp_path / "pairs.jsonl", text_rows())
    (tmp_path / "run.yaml").write_text("model_name_or_path: my-model\ndataset_name: pairs.jsonl\n")
    for folder in ("one", "many"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "trainer_state.json").write_text('{"log_history": [{"loss": 0.7, "grad_norm": 3.0}]}')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def mine() -> Iterator[str]:
    """The code of the peer that is CONTRIBUTING's example; whatever peers a test adds are forgotten after it."""
    before = dict(PEERS)
    (code,) = (code for code in blocks(CONTRIBUTING, "python") if "TokenPeer" in code)
    yield code
    PEERS.clear()
    PEERS.update(before)
