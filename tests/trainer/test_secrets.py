"""fastdpo.trainer.secrets: no token is written, wherever in the settings or the environment it was."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import make_model
from toy_data import make_tokenizer, text_rows, write_jsonl

from fastdpo.commands.cli import main
from fastdpo.commands.flags import TrainParser
from fastdpo.report.facts import all_settings, changed_settings, command_line
from fastdpo.trainer import DPOConfig, DPOTrainer, secrets
from fastdpo.trainer.secrets import HIDDEN, is_secret_name, redacted, redacted_words, without_secrets

# Of the form of Hugging Face's, and of no form.
TOKEN, PLAIN = "hf_" + "AbCdEfGhIjKlMnOpQrStUvWxYz01234567", "correct-horse-battery"
FORMS = [
    TOKEN,
    "ghp_" + "a1B2" * 9,
    "github_pat_" + "a1B2" * 9,
    "glpat-" + "a1B2" * 5,
    "sk-" + "a1B2" * 10,
    "AKIA" + "ABCD" * 4,
    "AIza" + "a1B2" * 9,
    "xoxb-123456789012-abcdef",
    "eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJSM",
    "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_known", set())
    monkeypatch.setattr(secrets, "_logged_in", lambda: None)


@pytest.mark.parametrize("form", FORMS)
def test_values_of_a_known_form_are_hidden_wherever_they_stand(form: str) -> None:
    for value in (form, f"run of {form}.", {"a": [(form,)]}, [{"name": {"x": form}}]):
        assert form not in repr(redacted(value)) and "hidden" in repr(redacted(value))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((name, True) for name in ("hub_token", "--hub-token", "token", "use_auth_token", "HF_TOKEN", "authToken")),
        *((name, True) for name in ("password", "DB_PASSWORD", "api_key", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY")),
        *((name, False) for name in ("pad_token", "end_token", "eos_token", "sort_key", "key", "max_new_tokens")),
        *((name, False) for name in ("tokenizer", "TOKENIZERS_PARALLELISM", "HF_TOKEN_PATH", "seed", 3)),
    ],
)
def test_names_that_say_what_they_are(name: Any, expected: bool) -> None:
    assert is_secret_name(name) is expected


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        (f"https://me:{PLAIN}@example.org/a.jsonl", "https://(hidden)@example.org/a.jsonl"),
        (f"https://{PLAIN}@example.org/a", "https://(hidden)@example.org/a"),
        (f"see https://x.org/a?part=1&token={PLAIN}&x=2#y", "see https://x.org/a?part=1&token=(hidden)&x=2#y"),
        (f"https://x.org/a?X-Amz-Signature={PLAIN}", "https://x.org/a?X-Amz-Signature=(hidden)"),
        (f"https://x.org/a?sv=1&sig={PLAIN}", "https://x.org/a?sv=1&sig=(hidden)"),
        ("https://x.org/a?design=1", "https://x.org/a?design=1"),
        ("hf://datasets/me/x@main/a.jsonl", "hf://datasets/me/x@main/a.jsonl"),
    ],
)
def test_what_urls_hold(url: str, kept: str) -> None:
    assert redacted(url) == kept == redacted(kept)


LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=20))
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=12,
)


@given(TREES, st.sampled_from(["token", "hub_token", "api_key", "password"]), st.integers(1, 4))
def test_at_any_depth(tree: Any, name: str, depth: int) -> None:
    value: Any = {"beside": tree, name: PLAIN}
    for i in range(depth):
        value = [value, tree] if i % 2 else {"inner": value}
    assert PLAIN not in repr(redacted(value)) and HIDDEN in repr(redacted(value))
    assert redacted(redacted(value)) == redacted(value)


@pytest.mark.parametrize("under", [[PLAIN], (PLAIN, 1), {"a": [{"b": PLAIN}]}, {PLAIN}])
def test_all_that_stands_under_a_secrets_name(under: Any) -> None:
    settings = {"storage_options": {"credentials": under, "anon": True}, "token": True}
    assert PLAIN not in repr(redacted(settings)) and PLAIN not in repr(redacted(settings, None))
    assert redacted(settings)["token"] is True and redacted(settings)["storage_options"]["anon"] is True
    secrets.remember_secrets(settings)
    assert redacted(f"cannot use {PLAIN}") == "cannot use (hidden)"


@given(TREES)
def test_what_holds_no_secret_stays_as_it_is(tree: Any) -> None:
    assert redacted(tree) == tree or HIDDEN in repr(redacted(tree))


def test_a_value_once_known_is_hidden_in_any_text() -> None:
    assert PLAIN in redacted(f"error: cannot use {PLAIN}")
    secrets.remember_secrets({"model_init_kwargs": {"deep": [{"token": PLAIN, "password": "ab"}]}})
    assert redacted(f"error: cannot use {PLAIN} about abbeys") == "error: cannot use (hidden) about abbeys"


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD"])
def test_the_environments_tokens_are_known(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, PLAIN)
    assert PLAIN not in repr(redacted({"run_name": f"x-{PLAIN}"}))


def test_the_token_of_the_hubs_client_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "_logged_in", lambda: PLAIN)
    assert redacted(f"--run_name {PLAIN}") == "--run_name (hidden)"


@pytest.mark.parametrize(
    "words",
    [
        ["--hub_token", PLAIN],
        ["--hub-token", PLAIN],
        [f"--hub_token={PLAIN}"],
        ["--model_init_kwargs", json.dumps({"token": PLAIN, "revision": "main"})],
        [f"--model_init_kwargs={json.dumps({'a': {'api_key': PLAIN}})}"],
        ["--dataset_name", f"https://me:{PLAIN}@x.org/a.jsonl"],
        ["--run_name", TOKEN],
    ],
)
def test_no_command_line_shows_them(words: list[str]) -> None:
    shown = redacted_words(["--beta", "0.5", *words, "--end_token", "<|im_end|>"])
    assert PLAIN not in repr(shown) and TOKEN not in repr(shown) and HIDDEN in repr(shown)
    assert shown[:2] == ["--beta", "0.5"] and shown[-2:] == ["--end_token", "<|im_end|>"]
    assert PLAIN not in command_line(words)


def test_no_setting_whatever_it_is_called_shows_one(tmp_path: Path) -> None:
    """A token in each of all settings, one after another."""
    arguments = TrainParser().read(["--use_cpu", "--output_dir", str(tmp_path)])
    args = arguments[2]
    assert isinstance(args, DPOConfig)
    for part in arguments:
        for field in dataclasses.fields(part):
            for planted in (TOKEN, {"x": TOKEN}, [TOKEN], f"a {TOKEN} b"):
                before = part.__dict__[field.name]
                part.__dict__[field.name] = planted
                shown = [repr(all_settings(arguments)), repr(changed_settings({field.name: (planted, None)}))]
                if part is args:
                    file = io.BytesIO()
                    torch.save(without_secrets(args), file)
                    shown += [file.getvalue().decode("latin-1")]
                part.__dict__[field.name] = before
                assert not [text for text in shown if TOKEN in text], field.name


def test_training_arguments_that_are_shown_or_reported_have_none(tmp_path: Path) -> None:
    kwargs = {"token": PLAIN, "deep": {"password": PLAIN}}
    args = DPOConfig(str(tmp_path), use_cpu=True, hub_token=PLAIN, model_init_kwargs=kwargs)
    for shown in (repr(args), str(args), repr(args.to_dict()), args.to_json_string(), repr(args.to_sanitized_dict())):
        assert PLAIN not in shown and "learning_rate" in shown
    assert args.hub_token == PLAIN and args.model_init_kwargs == kwargs  # they are of use to the run
    clean = without_secrets(args)
    assert clean.hub_token is None and clean.model_init_kwargs == {"token": None, "deep": {"password": None}}
    assert args.hub_token == PLAIN


def test_an_error_about_settings_has_none(tmp_path: Path) -> None:
    args = DPOConfig(str(tmp_path), use_cpu=True, model_init_kwargs={"token": PLAIN, "revision": "main"})
    rows = Dataset.from_list(text_rows(4))
    with pytest.raises(ValueError, match="model_init_kwargs is .*hidden.*main") as caught:
        DPOTrainer(make_model("llama"), args=args, train_dataset=rows, processing_class=make_tokenizer())
    assert PLAIN not in str(caught.value)


def holding(folder: Path, *tokens: str) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path.name for path in files if any(token.encode() in path.read_bytes() for token in tokens)]


@pytest.mark.usefixtures("one_thread", "quiet_and_uncached")
def test_a_run_writes_none_into_its_folder_or_to_the_terminal(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", text_rows(8))
    of_env, in_kwargs, of_url = "env-secret-0123", "kwargs-secret-45", "url-secret-67890"
    monkeypatch.setenv("HF_TOKEN", of_env)
    flags = {"model_name_or_path": model, "dataset_name": pairs, "output_dir": tmp_path / "run", "report_to": "none"}
    flags |= {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 2, "report_pairs": 2}
    flags |= {"report_samples": 1, "report_max_new_tokens": 2, "max_length": 128}
    flags |= {"hub_token": PLAIN, "model_init_kwargs": json.dumps({"token": in_kwargs}), "run_name": f"r {of_env}"}
    flags |= {"hub_model_id": f"https://me:{of_url}@x.org/{TOKEN}"}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    words += ["--precompute_ref_log_probs", "--use_cpu"]
    tokens = (PLAIN, of_env, in_kwargs, of_url, TOKEN)
    assert main(["train", *words]) == 0
    assert (tmp_path / "run" / "_ref_cache" / "train" / "manifest.json").exists()
    assert holding(tmp_path / "run", *tokens) == []
    args = torch.load(tmp_path / "run" / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert isinstance(args, DPOConfig) and (args.hub_token, args.max_steps) == (None, 2)
    assert "(hidden)" in (tmp_path / "run" / "report.html").read_text()
    # What goes wrong with them is said without them.
    assert main(["train", *words, "--dataset_name", f"https://me:{of_url}@x.org/none.jsonl"]) == 2
    assert main(["train", *words, "--resume_from_checkpoint", f"{tmp_path}/{in_kwargs}"]) == 2
    said = capfd.readouterr()
    assert not [token for token in tokens if token in said.out + said.err]
    assert "error: " in said.err and "(hidden)" in said.err
