"""`fastdpo eval`, end to end: its page and file, its judge killed and resumed, and what of its input can be wrong."""

from __future__ import annotations

import json
import threading
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from judge_server import judging
from peft import LoraConfig, get_peft_model
from tiny_models import make_model
from toy_data import make_tokenizer, text_rows, write_jsonl

from fastdpo.commands import evaluate as command
from fastdpo.commands.cli import main
from fastdpo.commands.evaluation_flags import EvalParser
from fastdpo.evaluation.judge_answers import JudgeAnswers

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")

KEY = "never-to-be-written-0123456789"
NASTY = "<script>alert('x')</script> {{ 7 * 7 }}"
ALWAYS = ["--use_cpu", "--max_length", "96", "--resamples", "100", "--disable_tqdm"]


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.chdir(tmp_path)
    for name in ("OPENAI_API_KEY", "JUDGE_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    names = {name: str(root / name) for name in ("base", "adapter", "pairs.jsonl")}
    make_model("llama").save_pretrained(names["base"])
    make_tokenizer().save_pretrained(names["base"])
    torch.manual_seed(0)
    adapter = get_peft_model(
        make_model("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    adapter.peft_config["default"].base_model_name_or_path = names["base"]
    adapter.save_pretrained(names["adapter"])
    rows = [{**row, "source": NASTY if i % 2 else "b"} for i, row in enumerate(text_rows(16))]
    write_jsonl(Path(names["pairs.jsonl"]), rows)
    return names


def run(folders: dict[str, str], *words: str) -> dict[str, Any]:
    """What it writes into ``out``."""
    assert main(["eval", "--dataset_name", folders["pairs.jsonl"], "--output_dir", "out", *ALWAYS, *words]) == 0
    found: dict[str, Any] = json.loads(Path("out/evaluation.json").read_text())
    return found


class Page(HTMLParser):
    """The elements and the text of a page; all that is opened has to be closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in ("meta", "circle", "line", "path", "br"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("circle", "line", "path"):
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_and_file(folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    models = ["--model", folders["adapter"], "--model", folders["base"]]
    found = run(folders, *models, "--slice_by", "source", "--dataset_test_split", "train[4:]")
    assert [model["name"] for model in found["models"]] == [folders["adapter"], folders["base"]]
    assert [model["reference"] for model in found["models"]] == [folders["base"], None]
    whole = found["slices"][0]
    assert whole["pairs"] == 12 and set(whole["models"][0]["accuracy"]) == {"reward", "likelihood", "per_token"}
    assert {part["by"] for part in found["slices"]} >= {"all", "the longer answer", "source"}
    pairs = found["pairs"]["models"][0]
    margins = [a - b for a, b in zip(pairs["chosen_logps"], pairs["rejected_logps"], strict=True)]
    assert whole["models"][0]["margin"]["likelihood"]["value"] == pytest.approx(sum(margins) / 12)
    assert found["pairs"]["row"] == list(range(12)) and found["judge"] is None and found["intervals"]["level"] == 0.95
    page = Page(Path("out/evaluation.html"))
    assert {"script", "link", "img", "iframe"}.isdisjoint(page.tags) and not {"src", "href"} & page.attributes
    assert NASTY in page.text
    assert "12 prompts are few" in page.text and "At equal lengths" in page.text and "By part" in page.text
    said = capsys.readouterr()
    assert "12 prompts are few" in said.out and "out/evaluation.html" in said.out and "nan" not in said.out.lower()
    assert "Traceback" not in said.err


def test_one_model_beside_its_start_and_its_report_links_to_it(folders: dict[str, str], tmp_path: Path) -> None:
    flags = {
        "model_name_or_path": folders["base"],
        "dataset_name": folders["pairs.jsonl"],
        "test_split_size": 0.25,
        "output_dir": "trained",
        "max_length": 96,
        "max_steps": 2,
        "eval_strategy": "steps",
        "learning_rate": 1e-3,
        "use_peft": True,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_samples": 0,
        "report_to": "none",
        "save_strategy": "no",
    }
    Path("run.yaml").write_text(json.dumps(flags))  # which is YAML as well
    assert main(["train", "--config", "run.yaml"]) == 0
    report = Path("trained/report.html")
    assert "fastdpo eval --model trained" in report.read_text() and "href" not in report.read_text()
    # The training's file of flags is all that is needed: its model, its start, its held-out pairs.
    assert main(["eval", "--config", "run.yaml", "--resamples", "100"]) == 0
    found = json.loads(Path("trained/evaluation.json").read_text())
    assert found["models"] == [{"name": "trained", "reference": folders["base"]}]
    state = [
        line
        for line in json.loads(Path("trained/trainer_state.json").read_text())["log_history"]
        if "eval_loss" in line
    ]
    whole = found["slices"][0]
    assert whole["pairs"] == 4
    assert whole["models"][0]["margin"]["reward"]["value"] == pytest.approx(state[-1]["eval_rewards/margins"], abs=1e-5)
    assert whole["models"][0]["logps"]["chosen"]["value"] == pytest.approx(state[-1]["eval_logps/chosen"], rel=1e-5)
    assert 'href="evaluation.html"' in report.read_text()
    # A training's file without an output_dir is of the folder that the training took.
    Path("trained").rename("trainer_output")
    Path("run.yaml").write_text(json.dumps({name: value for name, value in flags.items() if name != "output_dir"}))
    assert main(["eval", "--config", "run.yaml", "--resamples", "100"]) == 0
    again = json.loads(Path("trainer_output/evaluation.json").read_text())
    assert again["slices"] == found["slices"] and again["models"][0]["name"] == "trainer_output"


def test_without_a_split_all_is_taken_and_said(folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    found = run(folders, "--model_name_or_path", folders["base"])
    assert found["slices"][0]["pairs"] == 16 and found["models"] == [{"name": folders["base"], "reference": None}]
    assert "there is no split test: figures are too good if a model was trained on them" in found["notes"][0]
    assert "reward" not in found["slices"][0]["models"][0]["accuracy"]


def test_a_full_disk(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device", "evaluation.json")

    monkeypatch.setattr(command, "write_results", full)
    words = ["--dataset_name", folders["pairs.jsonl"], "--model", folders["base"], "--output_dir", "out"]
    assert main(["eval", *words, *ALWAYS]) == 2
    error = capsys.readouterr().err
    assert "evaluation.json could not be written: No space left on device. Make room, or name another folder" in error
    assert "checkpoint" not in error and not Path("out/evaluation.html").exists()


# --------------------------------------------------------------------------------------------------------------------
# Judges
# --------------------------------------------------------------------------------------------------------------------


def judge_words(url: str, *more: str) -> list[str]:
    return ["--judge_url", url, "--judge_model", "someone", "--max_new_tokens", "6", "--judge_prompts", "5", *more]


def longer(prompt: str, a: str, b: str) -> str:
    return f"Verdict: {'A' if len(a) >= len(b) else 'B'}"


def everything_written(root: Path) -> bytes:
    return b"\0".join(path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file())


def test_a_judge_compares_two_models(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    models = ["--model", folders["adapter"], folders["base"], "--judge_key_env", "JUDGE_KEY"]
    with judging(longer) as server:
        found = run(folders, *models, *judge_words(server.url))
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
        asked = len(server.bodies)
        assert 0 < asked <= 10
        again = run(folders, *models, *judge_words(server.url))
        assert len(server.bodies) == asked and again["judge"] == found["judge"]
        # A wrong key, of which the server says which it was.
        Path("out/judge_answers.jsonl").unlink()
        server.failures += [(401, {}, f'{{"error": {{"message": "no such key: {KEY}"}}}}')] * 20
        assert main(["eval", "--dataset_name", folders["pairs.jsonl"], *models, *ALWAYS, *judge_words(server.url)]) == 2
    said = capsys.readouterr()
    assert "answers 401: no such key: (hidden)" in said.err and KEY not in said.out + said.err
    # What was scored is not lost with it.
    left = json.loads((Path(folders["adapter"]) / "evaluation.json").read_text())
    assert left["slices"] == found["slices"] and left["judge"]["contests"] == []
    assert any(note.startswith("Judged in part, or not at all: the judge at") for note in left["notes"])
    assert "answers 401" in Page(Path(folders["adapter"]) / "evaluation.html").text
    assert KEY.encode() not in everything_written(tmp_path)
    (contest,) = found["judge"]["contests"]
    assert found["judge"]["model"] == "someone" and contest["sides"] == [folders["adapter"], folders["base"]]
    assert contest["contests"] == 5 and len(contest["answers"]) == 5
    for answer in contest["answers"]:
        first, second = answer["first"], answer["second"]
        # Equal lengths: whichever is read first. Equal answers: a tie, and nobody is asked.
        both = (0.5, 0.5) if first == second else (float(len(first) >= len(second)), float(len(first) > len(second)))
        assert (answer["first_gets_read_first"], answer["first_gets_read_second"]) == both
    page = Page(Path("out/evaluation.html"))
    assert "by someone at" in page.text and "same verdict in both orders" in page.text


def test_a_model_alone_is_compared_with_the_chosen_answers(folders: dict[str, str]) -> None:
    with judging(lambda prompt, a, b: "nothing that can be read") as server:
        found = run(folders, "--model", folders["base"], *judge_words(server.url))
        assert "Authorization" not in server.headers[0]
    (contest,) = found["judge"]["contests"]
    assert (
        contest["sides"][1] == "chosen answers of the data" and contest["unread"] == 5 and contest["win_rate"] is None
    )
    # Cut where the model's own are.
    chosen = {row["prompt"]: row["chosen"].strip() for row in text_rows(16)}
    for answer in contest["answers"]:
        whole, seen = chosen[answer["prompt"]], answer["second"]
        assert whole.startswith(seen) and answer["second_is_cut"] == (whole != seen)
        assert 0 < answer["second_tokens"] <= 6 and answer["second_is_cut"] == (answer["second_tokens"] == 6)
    assert contest["cut"] == [0, 0], "none of these was judged"
    assert {answer["prompt"] for answer in contest["answers"]} <= {row["prompt"] for row in text_rows(16)}
    Page(Path("out/evaluation.html"))


def test_a_prompt_that_the_judge_refuses_is_named(folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    said = '{"error": {"message": "the <filter> says no"}}'
    odd = text_rows(16)[4]["prompt"]
    with judging(lambda prompt, a, b: (400, said) if prompt == odd else longer(prompt, a, b)) as server:
        found = run(folders, "--model", folders["base"], *judge_words(server.url, "--judge_prompts", "16"))
    (contest,) = found["judge"]["contests"]
    assert (contest["contests"], contest["unread"]) == (15, 0)
    assert contest["refused"] == [{"row": 4, "said": "answers 400: the <filter> says no"}]
    assert [answer["row"] for answer in contest["answers"] if answer["refused"]] == [4]
    page, out = Page(Path("out/evaluation.html")).text, capsys.readouterr().out
    assert "1 prompts are left out: the judge refused to judge them (row 4: answers 400: the <filter> says no)" in page
    assert "1 that the judge refused (row 4: answers 400: the <filter> says no)" in out
    cut = sum(answer["second_is_cut"] for answer in contest["answers"] if not answer["refused"])
    assert cut and f"{cut} of chosen answers of the data" in page and f"{cut} of chosen answers of the data" in out


def test_rewards_are_said_to_be_of_sums(folders: dict[str, str]) -> None:
    found = run(
        folders, "--model_name_or_path", folders["base"], "--average_log_prob", "--dataset_test_split", "train[:4]"
    )
    assert any("--average_log_prob" in note and "sums over all tokens" in note for note in found["notes"])


def test_a_kill_keeps_what_was_answered(folders: dict[str, str], tmp_path: Path) -> None:
    words = [
        "eval",
        "--dataset_name",
        folders["pairs.jsonl"],
        "--model",
        folders["base"],
        "--output_dir",
        "out",
        *ALWAYS,
    ]
    with judging(longer) as server:
        words += judge_words(server.url, "--judge_workers", "1")
        reached, goes_on = threading.Event(), threading.Event()

        def slow(prompt: str, a: str, b: str) -> str:
            if len(server.bodies) > 4:
                reached.set()
                goes_on.wait(60)
            return longer(prompt, a, b)

        server.verdict = slow
        program = processes.start(processes.MAIN, *words, no_proxy="*")
        while not reached.wait(0.05) and program.process.is_alive():
            pass
        program.kill()
        goes_on.set()
        assert reached.is_set() and len(JudgeAnswers(tmp_path / "out" / "judge_answers.jsonl")) == 4
        assert not (tmp_path / "out" / "evaluation.json").exists()
        server.verdict = longer
        before = len(server.bodies)
        assert main(words) == 0
        assert len(server.bodies) - before == 6  # of ten
    assert json.loads(Path("out/evaluation.json").read_text())["judge"]["contests"][0]["contests"] == 5


# --------------------------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------------------------


def test_models_are_gathered_and_the_command_line_wins(tmp_path: Path) -> None:
    Path("run.yaml").write_text("model: [x, y]\nslice_by: source\nbeta: 0.5\n")
    *_, args = EvalParser().read(["--config", "run.yaml"])
    assert args.model == ["x", "y"] and args.slice_by == ["source"]
    parser = EvalParser()
    for _ in range(2):
        *_, args = parser.read(["--config", "run.yaml", "--model", "a", "b", "--model", "c"])
        assert args.model == ["a", "b", "c"] and args.slice_by == ["source"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--model is needed"),
        (["--model", "./nowhere"], "--model ./nowhere: no such folder"),
        (["--model", "{base}", "--model_name_or_path", "./nowhere"], "--model_name_or_path ./nowhere: no such folder"),
        (["--model", "{base}", "{base}"], "is named twice"),
        (["--model", "{base}", "--slice_by", "sauce"], "there is no column 'sauce'"),
        (["--model", "{base}", "--dataset_test_split", "dev"], "dev"),
        (["--model", "{base}", "--dataset_streaming"], "leave --dataset_streaming out"),
        (["--model", "{base}", "--resamples", "3"], "resamples is 3; it should be at least 100"),
        (["--model", "{base}", "--confidence", "95"], "confidence is 95"),
        (["--model", "{base}", "--judge_model", "x"], "no effect without --judge_url"),
        (["--model", "{base}", "--judge_prompts", "7"], "--judge_prompts would have no effect without --judge_url"),
        (["--model", "{base}", "--temperature", "1"], "--temperature would have no effect without --judge_url"),
        (
            ["--model", "{base}", *judge_words("http://localhost:1/v1", "--judge_key_env", "NO_SUCH_KEY")],
            "--judge_key_env NO_SUCH_KEY: the environment has no such variable, or an empty one",
        ),
        (["--model", "{base}", "--judge_url", "http://localhost:1/v1"], "--judge_model is needed"),
        (["--model", "{base}", "--judge_url", "localhost", "--judge_model", "x"], "needed an address such as"),
        (["--model", "{base}", "--judge_workers", "0"], "judge_workers is 0; it should be at least 1"),
        (["--modle", "{base}"], "unknown flag --modle. Did you mean --model?"),
    ],
)
def test_bad_input(words: list[str], message: str, folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    words = [word.format(**folders) for word in words]
    assert main(["eval", "--dataset_name", folders["pairs.jsonl"], *ALWAYS, *words]) == 2
    error = capsys.readouterr().err
    assert "fastdpo eval: error: " in error and message in error and "Traceback" not in error


@pytest.mark.parametrize(("words", "groups"), [([], False), (["--loss_type", "plackett_luce"], True)])
def test_several_answers_stay_together_where_the_training_keeps_them(
    words: list[str], groups: bool, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def load(*args: Any, **options: Any) -> Any:
        asked.append(options["groups"])
        raise command.UsageError("that will do")

    monkeypatch.setattr(command, "load_held_out", load)
    assert main(["eval", "--dataset_name", folders["pairs.jsonl"], *ALWAYS, "--model", folders["base"], *words]) == 2
    assert asked == [groups]


def test_several_processes_are_refused(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.DPOConfig, "world_size", 2)
    assert main(["eval", "--dataset_name", folders["pairs.jsonl"], "--model", folders["base"], *ALWAYS]) == 2
    assert "one process" in capsys.readouterr().err
