"""``fastdpo merge``: what it writes and says, and what it leaves where it stops."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from made_adapters import make_adapter, make_base
from safetensors import safe_open
from toy_data import CHAT_TEMPLATE, group_rows, make_tokenizer, text_rows, write_jsonl
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from fastdpo.commands.cli import main
from fastdpo.export import folder as export_folder
from fastdpo.model.quantization import make_quantization_config
from fastdpo.ref_cache.fingerprints import tokenizer_fingerprint
from fastdpo.ref_cache.lock import held
from fastdpo.trainer.manifest import write_manifest
from fastdpo.trainer.resume_settings import settings_of

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    base = make_base(root / "base", dtype=torch.bfloat16, tie_word_embeddings=True)
    make_tokenizer().save_pretrained(base)
    GenerationConfig(eos_token_id=[2, 6], top_k=7, do_sample=True).save_pretrained(base)
    adapter = make_adapter(root / "adapter", base, target_modules=["q_proj", "down_proj"])
    head = make_adapter(root / "head", base, target_modules=["q_proj", "lm_head"])
    return {"base": base, "adapter": adapter, "head": head}


def merge(*words: object) -> int:
    return main(["merge", *map(str, words)])


def dtypes_in(folder: Path) -> set[torch.dtype]:
    found = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= {file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 (not a dict)
    return found


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_tokenizer_that_would_be_another_one_is_warned_of(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same file, with the rules that transformers gives to every Qwen2; beside an adapter it has its own."""
    base = make_base(tmp_path / "base", "qwen2")
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["q_proj"])
    make_tokenizer().save_pretrained(adapter)
    assert merge(adapter, "--output_dir", tmp_path / "m") == 0
    out = capsys.readouterr().out
    assert "is loaded as Qwen2Tokenizer" in out and "texts may become other tokens" in out
    advised = PreTrainedTokenizerFast.from_pretrained(tmp_path / "m")
    assert tokenizer_fingerprint(advised) == tokenizer_fingerprint(AutoTokenizer.from_pretrained(adapter))
    assert merge(folders["adapter"], "--output_dir", tmp_path / "other") == 0
    assert "Warning" not in capsys.readouterr().out


def test_a_folder_that_others_load(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge(folders["adapter"], "--output_dir", tmp_path / "m", "--max_shard_size", "40KB") == 0
    out = capsys.readouterr().out
    assert "from the live adapter's in float32" in out and "the adapter changes them by" in out
    assert "in bfloat16, read back:" in out and "% is kept." in out
    assert left_in(tmp_path) == ["m"]
    assert dtypes_in(tmp_path / "m") == {torch.bfloat16} and len(list((tmp_path / "m").glob("model-*"))) > 1
    assert AutoConfig.from_pretrained(tmp_path / "m").dtype == torch.bfloat16
    assert AutoTokenizer.from_pretrained(tmp_path / "m").chat_template == CHAT_TEMPLATE
    settings = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert "eos_token" in settings and not {"is_local", "local_files_only"} & settings.keys(), "of who read it"
    generation = GenerationConfig.from_pretrained(tmp_path / "m")
    assert generation.eos_token_id == [2, 6] and generation.top_k == 7
    card = (tmp_path / "m" / "README.md").read_text(encoding="utf-8")
    assert str(folders["adapter"]) in card and "Log-probabilities of 252 tokens are" in card
    assert "library_name: transformers" in card
    assert not (tmp_path / "m" / "adapter_config.json").exists()


def test_both_ways_out_and_embeddings_that_become_two(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("gguf")
    words = ["--dtype", "float32", "--gguf", tmp_path / "m.gguf", "--gguf_type", "f32"]
    assert merge(folders["head"], "--output_dir", tmp_path / "m", *words) == 0
    out = capsys.readouterr().out
    assert "Input and output embedding, which are one in the base, are two here" in out
    assert dtypes_in(tmp_path / "m") == {torch.float32} and left_in(tmp_path) == ["m", "m.gguf"]
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    other = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    ids = torch.arange(40)[None]
    torch.testing.assert_close(one(ids).logits, other(ids).logits, rtol=0, atol=1e-5)
    assert merge(tmp_path / "m", "--gguf", tmp_path / "again.gguf", "--gguf_type", "f32") == 0  # a whole model
    assert (tmp_path / "again.gguf").stat().st_size == (tmp_path / "m.gguf").stat().st_size


def test_compared_on_pairs(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", text_rows(6))
    tokens = []
    for rows in ((), ("--rows", "1")):
        given = ["--dataset_name", pairs, *rows, "--overwrite_output_dir"]
        assert merge(folders["adapter"], "--output_dir", tmp_path / "m", *given) == 0
        tokens.append(int(capsys.readouterr().out.split("log-probabilities of ")[1].split()[0]))
    tokenizer, first = make_tokenizer(), text_rows(1)[0]
    sides = [tokenizer(first["prompt"] + first[side]).input_ids + [2] for side in ("chosen", "rejected")]
    assert tokens[1] == sum(len(side) - 1 for side in sides) and tokens[0] > 3 * tokens[1]
    (group,) = group_rows(2)[1:]
    groups = write_jsonl(tmp_path / "groups.jsonl", [group])
    assert merge(folders["adapter"], "--output_dir", tmp_path / "g", "--dataset_name", groups) == 0
    sides = [tokenizer(group["prompt"] + answer).input_ids + [2] for answer in group["completions"]]
    said = int(capsys.readouterr().out.split("log-probabilities of ")[1].split()[0])
    assert len(sides) == 3 and said == sum(len(side) - 1 for side in sides)


def test_the_run_tells_that_its_base_was_in_4_bits(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(folders["adapter"], adapter)
    from trainer_runs import config

    args = config(tmp_path / "run", model_init_kwargs={"quantization_config": make_quantization_config(4)})
    write_manifest(adapter, [], settings=settings_of(args))
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert merge(adapter, "--output_dir", tmp_path / "m", "--dtype", "float32") == 0
    assert "is taken in 4 bits (nf4), as the adapter was trained on it" in capsys.readouterr().out
    assert "in 4 bits (nf4)" in (tmp_path / "m" / "README.md").read_text(encoding="utf-8")
    assert merge(adapter, "--output_dir", tmp_path / "own", "--dtype", "float32", "--no-load_in_4bit") == 0
    assert "4 bits" not in capsys.readouterr().out
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("m", "own"))
    assert any(not torch.equal(one[name], other[name]) for name in one)


# --------------------------------------------------------------------------------------------------------------------
# Where it stops, and what is left
# --------------------------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten_unasked(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letters.txt").write_text("dear")
    (tmp_path / "m.gguf").write_text("mine")
    for words, error in (
        (["--output_dir", tmp_path / "m"], "is not empty; name another folder, or give --overwrite_output_dir"),
        (["--output_dir", tmp_path / "mine", "--overwrite_output_dir"], "holds no model"),
        (["--output_dir", folders["adapter"], "--overwrite_output_dir"], "is what is merged itself"),
        (["--output_dir", folders["base"], "--overwrite_output_dir"], "is what is merged itself"),
        (["--output_dir", tmp_path / "m.gguf"], "is a file"),
        (["--gguf", tmp_path / "m.gguf"], "exists; name another file"),
        (["--gguf", tmp_path / "m"], "is a folder; --gguf takes a file's name"),
        (["--output_dir", tmp_path / "m.gguf" / "a" / "m"], f"a/m cannot be made: {tmp_path / 'm.gguf'} is a file"),
        (["--gguf", tmp_path / "m.gguf" / "n.gguf"], f"n.gguf cannot be made: {tmp_path / 'm.gguf'} is a file"),
        (["--output_dir", tmp_path / "n", "--device", "nonsense"], "--device nonsense: "),
        (["--output_dir", tmp_path / "n", "--device", "cuda:99"], "--device cuda:99: "),
        (["--output_dir", tmp_path / "n", "--base_model", "./gone"], "error: --base_model ./gone: no such folder"),
        ([f"{folders['adapter']}/", "--output_dir", tmp_path / "n"], "/adapter is named twice; merged with itself"),
        ([], "where to? --output_dir FOLDER, or --gguf FILE"),
        (["--gguf", tmp_path / "n", "--dtype", "float32"], "--dtype would have no effect without --output_dir"),
        (["--output_dir", tmp_path / "n", "--rows", "2"], "--rows would have no effect without --dataset_name"),
    ):
        assert merge(folders["adapter"], *words) == 2
        assert error in capsys.readouterr().err
    assert merge(folders["base"], "--output_dir", tmp_path / "n") == 2
    assert "is no adapter, so there is nothing to merge" in capsys.readouterr().err
    assert left_in(tmp_path) == ["m", "m.gguf", "mine"] and left_in(tmp_path / "m") == ["config.json"]
    assert merge(folders["adapter"], "--output_dir", tmp_path / "m", "--overwrite_output_dir") == 0
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == "llama"
    assert left_in(tmp_path) == ["m", "m.gguf", "mine"]


def test_a_base_that_is_not_there(folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(folders["adapter"], adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for base in (str(tmp_path / "gone"), "no-such/model"):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
        assert merge(adapter, "--output_dir", tmp_path / "m") == 2
        error = " ".join(capsys.readouterr().err.split())
        assert f"{base}, which {adapter} was trained on, cannot be loaded (" in error
        assert "--base_model says where it is" in error
    assert merge(adapter, "--output_dir", tmp_path / "m", "--base_model", folders["base"]) == 0
    assert f"{adapter} names no-such/model as what it was trained on; --base_model" in capsys.readouterr().out
    assert merge("./gone", "--output_dir", tmp_path / "m") == 2
    assert "error: ./gone: no such folder" in capsys.readouterr().err


def test_a_full_disk(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_folder, "free_bytes", lambda folder: 1000)
    assert merge(folders["adapter"], "--output_dir", tmp_path / "m") == 2
    assert "was not begun: the model takes 50 MB, and 1 kB are free there" in capsys.readouterr().err
    monkeypatch.undo()

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    assert merge(folders["adapter"], "--output_dir", tmp_path / "m") == 2
    assert "could not be written: No space left on device; nothing of it is left" in capsys.readouterr().err
    assert left_in(tmp_path) == []


def test_one_at_a_time_and_what_a_killed_one_left(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".unfinished-m").mkdir()
    (tmp_path / ".unfinished-m" / "half").write_text("of it")
    with held(tmp_path / ".unfinished-m.lock"):
        assert merge(folders["adapter"], "--output_dir", tmp_path / "m") == 2
    assert "m is being written by process" in capsys.readouterr().err
    assert merge(folders["adapter"], "--output_dir", tmp_path / "m") == 0
    assert left_in(tmp_path) == ["m"] and "half" not in left_in(tmp_path / "m")


def test_what_is_read_back_otherwise_is_not_kept(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Changing:
        def of(self, model: torch.nn.Module) -> dict[str, str]:
            return {"lm_head.weight": str(id(model))}

    monkeypatch.setattr(export_folder, "WeightDigests", Changing)
    assert merge(folders["adapter"], "--output_dir", tmp_path / "m") == 2
    assert "reads back something else than what it wrote" in capsys.readouterr().err
    assert left_in(tmp_path) == []


def test_rounding_that_would_lose_the_adapter(
    tmp_path: Path, folders: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """A step so small that bfloat16 weights do not take it in."""
    adapter = tmp_path / "adapter"
    shutil.copytree(folders["adapter"], adapter)
    from safetensors.torch import load_file, save_file

    file = adapter / "adapter_model.safetensors"
    small = {name: t * 1e-5 if "lora_B" in name else t for name, t in load_file(file).items()}
    save_file(small, file, metadata={"format": "pt"})
    assert merge(adapter, "--output_dir", tmp_path / "m") == 2
    assert "% is kept of what the adapter does: its changes of weights are smaller" in capsys.readouterr().err
    assert left_in(tmp_path) == ["adapter"]
    assert merge(adapter, "--output_dir", tmp_path / "m", "--dtype", "float32") == 0


def test_float16_that_does_not_reach(folders: dict[str, Path], tmp_path: Path) -> None:
    from fastdpo.export.live import MergeError
    from fastdpo.export.merging import store_as

    model = AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e6
    with pytest.raises(MergeError, match=r"values that torch\.float16 does not reach to"):
        store_as(model, torch.float16)
