"""Chosen answers that became less likely: shown where it happens, by how much, on which rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tiny_models import make_model
from toy_data import make_tokenizer, text_rows
from trainer_runs import config

from fastdpo.report.displacement import displacement_of
from fastdpo.report.page import write_report
from fastdpo.report.record import RunRecord
from fastdpo.report.snapshot import Snapshot, SnapshotSize
from fastdpo.report.snapshot_taker import SnapshotTaker
from fastdpo.trainer import DPOTrainer

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")


def look(step: int, chosen: list[float], rejected: list[float], rows: list[str] | None = None) -> Snapshot:
    rewards = [0.0] * len(chosen)
    names = [f"row {i}: <b>?" for i in range(len(chosen))] if rows is None else rows
    return Snapshot("key", step, "the set", rewards, rewards, chosen, rejected, names)


def record(start: Snapshot | None, end: Snapshot | None, **options: Any) -> RunRecord:
    return RunRecord("t", [], 9, 9, "cpu", "padded", "fastdpo train", start=start, end=end, **options)


def test_by_how_much_and_on_which_rows() -> None:
    found = displacement_of(record(look(0, [-10, -20, -30], [-9, -9, -9]), look(9, [-12, -19, -37], [-19, -9, -29])))
    assert found is not None
    assert (found.pairs, found.fallen) == (3, 2)
    assert found.mean_change == pytest.approx(-8 / 3) and found.rejected_change == pytest.approx(-10)
    assert found.worst == [("row 2: <b>?", -7.0, -20.0), ("row 0: <b>?", -2.0, -10.0)]
    assert "2 of 3 chosen answers became less likely" in found.words and "likelihood displacement" in found.words
    assert any("dpop" in words for words in found.advice) and any("sft_weight" in words for words in found.advice)


def test_means_over_tokens_are_called_so(tmp_path: Path) -> None:
    """Where the loss has means, a hundredth of a nat of each token is what several nats of an answer are."""
    looks = look(0, [-1.0, -1.0], [-1.0, -1.0]), look(9, [-1.02, -1.0004], [-1.3, -1.3])
    found = displacement_of(record(*looks, settings={"average_log_prob": True}))
    assert found is not None and found.fallen == 1 and found.advice
    assert "(chosen answers by −0.0102 and rejected ones by −0.3000 nats a token, on average)" in found.words
    page = write_report(record(*looks, settings={"average_log_prob": True}), tmp_path / "report.html").read_text()
    assert '<td class="number">−0.0200</td><td class="number">−0.3000</td>' in page
    assert "nats a completion" not in page
    sums = displacement_of(record(*looks))
    assert sums is not None and sums.fallen == 0 and "nats a completion, on average" in sums.words
    weighted = record(*looks, settings={"ld_alpha": 0.5, "average_log_prob": False})
    assert weighted.logps_unit == "nats a completion, tokens beyond the shorter answer's length × 0.5"
    assert record(*looks, settings={"ld_alpha": 1.0}).logps_unit == "nats a completion"


def test_what_a_run_does_already_is_no_advice() -> None:
    looks = look(0, [-1.0], [-1.0]), look(9, [-3.0], [-9.0])
    found = displacement_of(record(*looks, loss="dpop", settings={"sft_weight": 0.5}))
    assert found is not None and not any("dpop" in words or "sft_weight" in words for words in found.advice)
    found = displacement_of(record(*looks, loss="plackett_luce"))
    assert found is not None and not any("sft_weight" in words for words in found.advice), "it would be refused"


@pytest.mark.parametrize("end", [[-9.0, -19.5], [-10.05, -19.0]])
def test_nothing_is_made_of_nothing(end: list[float]) -> None:
    found = displacement_of(record(look(0, [-10, -20], [-9, -9]), look(9, end, [-12, -12])))
    assert found is not None and not found.fallen and not found.worst and not found.advice
    assert found.words.startswith("No chosen answer became less likely")


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (None, look(9, [-1], [-1])),
        (look(0, [-1], [-1]), None),
        (Snapshot("key", 0, "the set"), look(9, [-1], [-1])),
        (look(0, [-1, -2], [-1, -2]), look(9, [-1], [-1])),
        (look(0, [-1], [-1]), look(9, [float("nan")], [-1])),
    ],
)
def test_without_two_looks_at_the_same_there_is_nothing_to_say(start: Snapshot | None, end: Snapshot | None) -> None:
    assert displacement_of(record(start, end)) is None


def test_the_page_says_it_and_escapes_rows(tmp_path: Path) -> None:
    start, end = look(0, [-10, -20], [-9, -9]), look(9, [-15, -20], [-19, -9])
    page = write_report(record(start, end), tmp_path / "report.html").read_text()
    assert "likelihood displacement" in page and "--loss_type dpop" in page
    assert '<td>row 0: &lt;b&gt;?</td><td class="number">−5.00</td><td class="number">−10.00</td>' in page
    assert "likelihood displacement" not in write_report(record(start, start), tmp_path / "other.html").read_text()


def test_looks_have_the_log_probabilities_of_their_rows(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    args = config(tmp_path, max_steps=3, learning_rate=1e-2)
    rows = Dataset.from_list(text_rows(6))
    trainer = DPOTrainer(make_model("llama"), args=args, train_dataset=rows, processing_class=tokenizer)
    taker = SnapshotTaker(trainer, SnapshotSize(pairs=4, samples=0))
    start = taker.take()
    trainer.train()
    end = taker.take(like=start)
    beta = trainer.args.beta
    for i in range(4):
        changed = end.chosen_logps[i] - start.chosen_logps[i]
        assert end.chosen_rewards[i] == pytest.approx(beta * changed, abs=1e-4), "the reference is the start"
        assert (
            end.rows[i].startswith("row ")
            and text_rows(6)[int(end.rows[i].split(":")[0][4:])]["prompt"][-20:] in end.rows[i]
        )
    assert end.rows == start.rows
    start.save(tmp_path / "start.json")
    assert Snapshot.load(tmp_path / "start.json") == start
    assert displacement_of(record(start, end)) is not None
