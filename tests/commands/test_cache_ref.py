"""`fastdpo cache-ref`, and training from what it leaves: killed, resumed, refused, and in two processes."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_models import make_model
from toy_data import CHAT_TEMPLATE, chat_rows, make_tokenizer, text_rows, write_jsonl
from transformers import AutoModelForCausalLM

from fastdpo.commands.cli import main
from fastdpo.data import REFERENCE_COLUMNS, PreferenceCollator, prepare
from fastdpo.ref_cache import RefCache, RefCacheError
from fastdpo.ref_cache import build as ref_build
from fastdpo.ref_cache.completions import completions_of
from fastdpo.ref_cache.files import LOGPS, MANIFEST, PARTS
from fastdpo.trainer import DPOConfig, DPOTrainer

# Dies as a machine does, after some batches, each of which is written.
KILLED_AFTER_BATCHES = """
import os, signal, sys
from fastdpo.commands import cli
from fastdpo.ref_cache import build as ref_build

ref_build.PART_SECONDS = 0.0
left, before = [int(sys.argv[1])], ref_build.ReferenceBuilder._score

def score(self, rows):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return before(self, rows)

ref_build.ReferenceBuilder._score = score
sys.exit(cli.main(sys.argv[2:]))
"""

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", chat_rows(16))


def words(command: str, model: Path, pairs: Path, cache: Path, *more: str) -> list[str]:
    flags = {
        "model_name_or_path": model,
        "dataset_name": pairs,
        "dataset_train_split": "train[:12]",
        "dataset_test_split": "train[12:]",
        "eval_strategy": "steps",
        "ref_cache": cache,
        "output_dir": cache.parent / "run",
        "max_length": 96,
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
    }
    return [command, *(word for name, value in flags.items() for word in (f"--{name}", str(value))), *more]


def saved(cache: Path) -> dict[str, list[float]]:
    return {name: RefCache(cache / name).load().tolist() for name in ("train", "eval")}


@pytest.fixture(scope="module")
def unbroken(model: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("runs") / "ref"
    assert main(words("cache-ref", model, pairs, cache, "--disable_tqdm")) == 0
    return cache


def refuse(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must fail with exit code 2 and a short message; return the message."""
    capsys.readouterr()
    assert main(argv) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line]
    start = next(i for i, line in enumerate(errors) if line.startswith(f"fastdpo {argv[0]}: error: "))
    assert len(errors) - start <= 2, errors
    return "\n".join(errors[start:])


# --------------------------------------------------------------------------------------------------------------------
# From the command to the training
# --------------------------------------------------------------------------------------------------------------------


def test_the_values_are_those_of_full_logits(unbroken: Path) -> None:
    tokenizer, reference = make_tokenizer(), make_model("llama", len(make_tokenizer())).double()
    for name, rows in (("train", chat_rows(16)[:12]), ("eval", chat_rows(16)[12:])):
        kept, _ = prepare(Dataset.from_list(rows), tokenizer, max_length=96)
        batch = PreferenceCollator(tokenizer.pad_token_id, max_length=96)(list(kept))
        with torch.no_grad():
            logits = reference(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        targets = batch["input_ids"][:, 1:]
        logps = logits[:, :-1].log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
        expected = (logps * batch["completion_mask"][:, 1:]).sum(-1).chunk(2)
        with_columns = completions_of(kept).with_columns(kept, RefCache(unbroken / name).load())
        for column, exact in zip(REFERENCE_COLUMNS, expected, strict=True):
            assert torch.tensor(with_columns[column][:]).double() == pytest.approx(exact, rel=1e-4)


def test_training_reads_what_cache_ref_wrote(
    unbroken: Path, model: Path, pairs: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(self: Any, rows: Any) -> None:
        raise AssertionError("nothing was to be computed")

    monkeypatch.setattr(ref_build.ReferenceBuilder, "_score", never)
    assert main(words("train", model, pairs, unbroken)) == 0
    said = capsys.readouterr().out.replace("\n", "")
    assert "train: 12 pairs read" in said and str(unbroken / "train") in said
    assert "eval: 4 pairs read" in said
    history = json.loads((unbroken.parent / "run" / "trainer_state.json").read_text())["log_history"]
    assert history[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    # An adapter's base model is the same reference, whatever the adapter's random start.
    for seed in ("1", "2"):
        more = ("--use_peft", "--lora_target_modules", "q_proj", "v_proj", "--seed", seed, "--max_steps", "1")
        assert main(words("train", model, pairs, unbroken, *more)) == 0


def test_training_makes_its_own_cache_in_its_folder(model: Path, pairs: Path, tmp_path: Path, capsys: Any) -> None:
    argv = words("train", model, pairs, tmp_path / "unused", "--precompute_ref_log_probs", "--max_steps", "1")
    i = argv.index("--ref_cache")
    del argv[i : i + 2]
    assert main(argv) == 0
    assert "train: 0 pairs read, 12 computed" in capsys.readouterr().out.replace("\n", "")
    assert (tmp_path / "run" / "_ref_cache" / "train" / LOGPS).exists()
    assert (tmp_path / "run" / "_ref_cache" / "eval" / LOGPS).exists()
    assert main(argv) == 0
    assert "train: 12 pairs read, " in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize("batches", [1, 5])
def test_a_killed_build_goes_on_to_identical_values(
    batches: int, unbroken: Path, model: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "ref"
    argv = words("cache-ref", model, pairs, cache, "--disable_tqdm")
    done = processes.run(KILLED_AFTER_BATCHES, str(batches), *argv, OMP_NUM_THREADS="1")
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert json.loads((cache / "train" / MANIFEST).read_text())["complete"] is False
    assert len(list((cache / "train").glob(PARTS))) == batches
    assert main(argv) == 0
    assert f"train: {2 * batches} pairs read, {12 - 2 * batches} computed" in capsys.readouterr().out.replace("\n", "")
    assert saved(cache) == saved(unbroken)


def test_ctrl_c_says_how_to_go_on(model: Path, pairs: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    before, calls = ref_build.ReferenceBuilder._score, []

    def interrupted(self: Any, rows: Any) -> Any:
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return before(self, rows)

    monkeypatch.setattr(ref_build.ReferenceBuilder, "_score", interrupted)
    argv = words("cache-ref", model, pairs, tmp_path / "ref", "--rebuild")
    assert main(argv) == 130
    stderr = capsys.readouterr().err
    assert f"What was computed is kept in {tmp_path / 'ref'}" in stderr and "fastdpo cache-ref --model" in stderr
    assert "--rebuild" not in stderr
    assert main([word for word in argv if word != "--rebuild"]) == 0
    assert "train: 4 pairs read, 8 computed" in capsys.readouterr().out.replace("\n", "")


# --------------------------------------------------------------------------------------------------------------------
# Refusals
# --------------------------------------------------------------------------------------------------------------------


def test_changes_are_refused_by_name_and_rebuild_replaces(
    unbroken: Path, model: Path, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "max_length was 96 and is 95" in refuse(words("train", model, pairs, unbroken, "--max_length", "95"), capsys)
    argv = words("train", model, pairs, unbroken, "--truncation_mode", "keep_end")
    assert "truncation_mode was 'keep_start' and is 'keep_end'" in refuse(argv, capsys)
    said = refuse(words("train", model, pairs, unbroken, "--bf16"), capsys)
    assert "compute_dtype was 'float32' and is 'bfloat16'" in said
    assert f"Delete {unbroken / 'train'} to have it built anew (`fastdpo cache-ref --rebuild` does both)" in said

    rows = chat_rows(16)
    rows[7]["rejected"][0]["content"] = "Something else."
    rows[9]["rejected"][0]["content"] = "Something else."
    other_pairs = write_jsonl(tmp_path / "pairs.jsonl", rows)
    said = refuse(words("train", model, other_pairs, unbroken), capsys)
    assert "row 7 (it begins with '<|user|>" in said and "is not there" in said and "weights" not in said
    argv = words("train", model, pairs, unbroken, "--dataset_train_split", "train[:11]")
    assert "24 completions there, 22 here" in refuse(argv, capsys)

    retrained, other_template = tmp_path / "retrained", tmp_path / "template"
    make_model("llama", len(make_tokenizer()), seed=1).save_pretrained(retrained)
    make_tokenizer().save_pretrained(retrained)
    assert "the weights differ" in refuse(words("train", retrained, pairs, unbroken), capsys)
    make_model("llama", len(make_tokenizer())).save_pretrained(other_template)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|end|>{% endfor %}", "\n<|end|>{% endfor %}")
    tokenizer.save_pretrained(other_template)
    said = refuse(words("train", other_template, pairs, unbroken), capsys)
    assert "the chat template differs" in said and "is not there, and 23 more" in said and "weights" not in said

    before = saved(unbroken)
    copy = tmp_path / "copy"
    assert main(words("cache-ref", model, pairs, copy)) == 0
    assert "the weights differ" in refuse(words("cache-ref", retrained, pairs, copy), capsys)
    assert main(words("cache-ref", retrained, pairs, copy, "--rebuild")) == 0
    assert saved(copy) != before == saved(unbroken)


def test_help_suffices(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["cache-ref", "--help"]) == 0
    said = capsys.readouterr().out
    for text in (
        "--ref_cache",
        "--rebuild",
        "--precompute_ref_batch_size",
        "what differs",
        "examples:",
        "manifest.json",
    ):
        assert text in said
    assert "--lora_r" not in said.split("accepted, and change nothing")[0]
    assert main(["--help"]) == 0
    assert "compute the reference's log-probabilities once" in capsys.readouterr().out


def test_flags_are_needed_and_known(model: Path, pairs: Path, tmp_path: Path, capsys: Any) -> None:
    assert "--dataset_name is needed" in refuse(["cache-ref", "--model_name_or_path", str(model)], capsys)
    argv = words("cache-ref", model, pairs, tmp_path / "ref", "--rebuilt")
    assert "unknown flag --rebuilt. Did you mean --rebuild?" in refuse(argv, capsys)


def test_a_batch_size_for_the_reference_needs_no_other_flag(model: Path, pairs: Path, tmp_path: Path) -> None:
    argv = words("cache-ref", model, pairs, tmp_path / "unused", "--precompute_ref_batch_size", "3")
    i = argv.index("--ref_cache")
    del argv[i : i + 2]
    assert main(argv) == 0
    manifest = json.loads((tmp_path / "run" / "_ref_cache" / "train" / MANIFEST).read_text())
    assert manifest["about"]["batch_size"] == 3


# --------------------------------------------------------------------------------------------------------------------
# From Python, and in several processes
# --------------------------------------------------------------------------------------------------------------------


def make_trainer(output_dir: Path, *, model: Any = None, **options: Any) -> DPOTrainer:
    rows = Dataset.from_list(text_rows(9))
    given = {name: options.pop(name) for name in ("ref_model", "peft_config") if name in options}
    settings = {"max_steps": 1, "save_strategy": "no", "ref_cache": str(output_dir)}
    settings |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    args = DPOConfig(str(output_dir), use_cpu=True, disable_tqdm=True, **(settings | options))
    return DPOTrainer(
        model or make_model("llama"),
        args=args,
        train_dataset=rows,
        eval_dataset={"one": rows.select(range(3)), "two": rows.select(range(3, 8))},
        processing_class=make_tokenizer(),
        **given,
    )


def test_evaluation_sets_have_caches_of_their_own(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    assert {name: split.rows for name, split in trainer.reference_splits.items()} == {
        "train": 9,
        "eval-one": 3,
        "eval-two": 5,
    }
    assert trainer.args.precompute_ref_log_probs and trainer.ref_model is None
    trainer.train()
    assert {"eval_one_loss", "eval_two_loss"} <= trainer.evaluate().keys()
    assert all(split.rows_read == split.rows for split in make_trainer(tmp_path).reference_splits.values())


def test_the_reference_is_where_the_run_began_also_when_it_is_resumed(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    first = make_trainer(tmp_path / "run", max_steps=2, **options)
    first.train()
    # Its cache is not there any more, and its checkpoint is.
    resumed = make_trainer(tmp_path / "run", max_steps=3, ref_cache=str(tmp_path / "other"), **options)
    assert resumed.reference_splits["train"].rows_read == 0
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert resumed.state.global_step == 3
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert resumed.train_dataset[name][:] == first.train_dataset[name][:]
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")
    with pytest.raises(RefCacheError, match="the weights differ"):
        make_trainer(tmp_path / "run", model=trained)


def test_the_reference_that_is_given_is_the_one_that_counts(tmp_path: Path) -> None:
    make_trainer(tmp_path / "a", ref_model=make_model("llama", seed=1))
    # The policy may be another one.
    again = make_trainer(tmp_path / "a", model=make_model("llama", seed=2), ref_model=make_model("llama", seed=1))
    assert again.reference_splits["train"].rows_read == 9
    with pytest.raises(RefCacheError, match="the weights differ"):
        make_trainer(tmp_path / "a", ref_model=make_model("llama", seed=2))


def test_a_trained_adapter_is_a_reference_of_its_own(tmp_path: Path) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(tmp_path, peft_config=config)
    assert make_trainer(tmp_path).reference_splits["train"].rows_read == 9  # untrained: the base model
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5)
    with pytest.raises(RefCacheError, match="the weights differ"):
        make_trainer(tmp_path, model=trainer.model)


def _cache_on_rank(rank: int, port: int, folder: str) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    trainer = make_trainer(Path(folder) / "two")
    columns = {name: trainer.train_dataset[name][:] for name in ("ref_chosen_logps", "ref_rejected_logps")}
    resumed = make_trainer(Path(folder) / "started").reference_splits["train"].rows_read
    try:
        make_trainer(Path(folder) / "two", model=make_model("llama", seed=1))
        refusal = ""
    except RefCacheError as error:
        refusal = str(error)
    torch.save({"columns": columns, "resumed": resumed, "refusal": refusal}, f"{folder}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_share_the_rows_and_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    one = make_trainer(tmp_path / "one")

    # Begun by one process, and gone on with by two.
    before, calls = ref_build.ReferenceBuilder._score, []

    def stopping(self: Any, rows: Any) -> Any:
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return before(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(ref_build.ReferenceBuilder, "_score", stopping)
        with pytest.raises(KeyboardInterrupt):
            make_trainer(tmp_path / "started")

    processes.spawn(_cache_on_rank, (port, str(tmp_path)), nprocs=2)
    for found in (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)):
        for name, values in found["columns"].items():
            assert values == one.train_dataset[name][:]
        assert found["resumed"] == 4
        assert "the weights differ" in found["refusal"]
    for name in ("two", "started"):
        mine, theirs = (RefCache(tmp_path / folder / "train").load() for folder in (name, "one"))
        assert mine.tolist() == theirs.tolist()
    assert json.loads((tmp_path / "two" / "train" / MANIFEST).read_text())["about"]["processes"] == 2
