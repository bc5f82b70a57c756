"""What is uploaded of a run: the model, the tokenizer and the card, and nothing that the run wrote for its owner."""

from __future__ import annotations

import logging
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers
from huggingface_hub.utils import filter_repo_objects
from toy_data import text_rows, write_jsonl

from fastdpo.commands.cli import main
from fastdpo.trainer import hub

CARD_AND_TOKENIZER = {"README.md", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}
MODEL = {"config.json", "generation_config.json", "model.safetensors"}
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
CHECKPOINT = {
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
    "training_args.bin",
    "fastdpo_manifest.json",
}

TOKEN = "hf_" + "AbCdEfGhIj" * 3

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")


class FakeApi:
    """Keeps what would be sent, of the files that are there at that moment."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def create_repo(self, name: str, **_: Any) -> Any:
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, *, folder_path: str, ignore_patterns: Any, run_as_future: bool, **about: Any) -> Any:
        folder = Path(folder_path)
        files = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        self.sent.append({"files": set(filter_repo_objects(files, ignore_patterns=ignore_patterns)), **about})
        done: Future = Future()
        done.set_result(None)
        return done if run_as_future else None


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> FakeApi:
    api = FakeApi()
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: api)
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    return api


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", text_rows(8))


def words(model: Path, pairs: Path, output_dir: Path, *more: str) -> list[str]:
    flags = {"model_name_or_path": model, "dataset_name": pairs, "output_dir": output_dir, "report_to": "none"}
    flags |= {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2, "hub_model_id": "mine"}
    flags |= {"report_pairs": 2, "report_samples": 1, "report_max_new_tokens": 2}
    given = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return ["train", *given, "--use_cpu", "--disable_tqdm", "--push_to_hub", "--precompute_ref_log_probs", *more]


@pytest.mark.parametrize("adapter", [False, True])
def test_it_is_the_model_the_tokenizer_and_the_card(
    adapter: bool, model: Path, pairs: Path, tmp_path: Path, api: FakeApi
) -> None:
    more = ["--use_peft", "--lora_target_modules", "q_proj"] if adapter else []
    for _ in range(2):  # the second run sets the first one's checkpoints aside, and finds its reports
        assert main(words(model, pairs, tmp_path / "run", *more)) == 0
    there = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"previous-1", "_ref_cache", "report.html", "training.png", "checkpoint-2"} <= there
    weights = ADAPTER if adapter else MODEL
    *during, end = api.sent[len(api.sent) // 2 :]
    assert end["files"] == weights | CARD_AND_TOKENIZER
    assert end["repo_id"] == "me/mine" and end["commit_message"] == "End of training"
    steps = [f"Training in progress, step {step}" for step in (1, 2)]
    assert [sent["commit_message"] for sent in during] == [*steps, "Model save"]
    assert all(sent["files"] == end["files"] for sent in during)  # with the first run's card


@pytest.mark.parametrize(
    ("strategy", "where"),
    [("end", []), ("checkpoint", ["last-checkpoint"] * 2), ("all_checkpoints", ["checkpoint-1", "checkpoint-2"])],
)
def test_checkpoints_go_where_they_were_asked_for(
    strategy: str, where: list[str], model: Path, pairs: Path, tmp_path: Path, api: FakeApi
) -> None:
    assert main(words(model, pairs, tmp_path / "run", "--hub_strategy", strategy)) == 0
    checkpoints = [sent for sent in api.sent if "path_in_repo" in sent]
    assert [sent["path_in_repo"] for sent in checkpoints] == where
    for sent in checkpoints:
        assert sent["files"] == MODEL | CHECKPOINT | CARD_AND_TOKENIZER - {"README.md"}
    others = [sent["files"] for sent in api.sent if "path_in_repo" not in sent]
    assert len(others) == len(where) + 2 and others[-1] == MODEL | CARD_AND_TOKENIZER


def test_no_checkpoint_that_is_uploaded_holds_a_token(
    api: FakeApi, model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[bytes] = []
    send = api.upload_folder

    def upload_folder(*, folder_path: str, **about: Any) -> Any:
        held.extend(path.read_bytes() for path in Path(folder_path).rglob("*") if path.is_file())
        return send(folder_path=folder_path, **about)

    monkeypatch.setattr(api, "upload_folder", upload_folder)
    token = "no-form-but-a-token"
    more = ["--push_to_hub", "--hub_strategy", "checkpoint", "--hub_token", token]
    assert main(words(model, pairs, tmp_path / "run", *more)) == 0
    assert [about for about in api.sent if about.get("path_in_repo")] and {about["token"] for about in api.sent} == {
        token
    }
    assert held and not [content for content in held if token.encode() in content]


def test_an_upload_that_was_cut_is_made_up_for(
    api: FakeApi, model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Also one that was not asked for, until the run was done."""
    auto = ("--resume_from_checkpoint", "auto", "--hub_strategy", "end")
    send, ends = api.upload_folder, "End of training"

    def refuse(*, commit_message: str, **about: Any) -> Any:
        if not commit_message.startswith("Training in progress"):
            raise hub._UPLOAD_ERRORS[1](f"no route for {TOKEN}")
        return send(commit_message=commit_message, **about)

    def run(*more: str) -> tuple[int, int, str]:
        api.sent.clear()
        code = main([*words(model, pairs, tmp_path / "run", *auto), *more])
        sent = [about["repo_id"] for about in api.sent if about["commit_message"] == ends]
        said = capsys.readouterr()
        return code, len(sent), " ".join((said.out + said.err).split())

    with monkeypatch.context() as patch:
        patch.setattr(api, "upload_folder", refuse)
        code, sent, said = run()
        assert (code, sent) == (2, 0) and "run, but its upload to the Hub failed: no route for (hidden)" in said
    code, sent, said = run()
    assert (code, sent) == (0, 1) and "was not uploaded to its end" in said
    code, sent, said = run()
    assert (code, sent) == (0, 0) and "Nothing to do" in said
    code, sent, said = run("--hub_model_id", "another")
    assert (code, sent) == (0, 1)


def test_an_upload_that_failed_meanwhile_is_told(
    api: FakeApi, model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    send = api.upload_folder

    def fail(*, run_as_future: bool, **about: Any) -> Any:
        if not run_as_future:
            return send(run_as_future=run_as_future, **about)
        failed: Future = Future()
        failed.set_exception(TimeoutError(f"timed out with {TOKEN}"))
        return failed

    monkeypatch.setattr(logging.getLogger("fastdpo"), "propagate", True)
    monkeypatch.setattr(api, "upload_folder", fail)
    assert main(words(model, pairs, tmp_path / "run")) == 0
    assert (
        caplog.messages.count("An upload to the Hub failed: timed out with (hidden). The run goes on.") == 2
    )  # of two steps
