"""fastdpo.evaluation.judge: both orders, ties, verdicts that cannot be read, and answers that are kept."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
from judge_server import judging

from fastdpo.evaluation.judge import (
    Contest,
    JudgeFigures,
    Refusal,
    Verdicts,
    judge_contests,
    judge_figures,
    question,
    read_verdict,
)
from fastdpo.evaluation.judge_answers import JudgeAnswers, key_of
from fastdpo.evaluation.judge_client import JudgeClient, JudgeError
from fastdpo.evaluation.statistics import Resampling

HOW = Resampling(draws=300)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")


def contest(first: str, second: str, prompt: str = "p") -> Contest:
    return Contest(prompt, first, second, len(first), len(second))


def judge(client: JudgeClient, answers: JudgeAnswers, contests: list[Contest], workers: int = 3) -> Verdicts:
    return judge_contests(contests, client, answers, workers=workers, label="", show_progress=False)


def by_length(prompt: str, a: str, b: str) -> str:
    return f"Verdict: {'tie' if len(a) == len(b) else 'A' if len(a) > len(b) else 'B'}"


@pytest.mark.parametrize(
    ("reply", "gets"),
    [
        ("Verdict: A", 1.0),
        ("I like B more.\n**Verdict: B**", 0.0),
        ("Verdict: tie.", 0.5),
        ("verdict – Answer a", 1.0),
        ("At first verdict: A seemed right. Verdict: B", 0.0),
        ("A", 1.0),
        (" [B]. ", 0.0),
        ("Verdict: Apples", None),
        ("Verdict: A, which is clearer.", 1.0),
        ("Verdict: A is better than B", 1.0),
        ("Verdict: **B** (A is longer)", 0.0),
        ("Verdict: a tie.", 0.5),
        ("**Verdict:** A tie", 0.5),
        ("Verdict: it's a tie", 0.5),
        ("Verdict: A and B are equally good", None),
        ("Verdict: A/B", None),
        ("Verdict: A or B?", None),
        ("Verdict: A = B", None),
        ("Verdict: B. The verdict: a close one.", 0.0),
        ("<think>Is it Verdict: A? No.</think>\n\nVerdict: B", 0.0),
        ("<think>Verdict: A, or is it", None),
        ("<think>Verdict: A.</think> I cannot say.", None),
        ("Both are good.", None),
        ("A is better than B", None),
        ("", None),
    ],
)
def test_verdicts_are_read(reply: str, gets: float | None) -> None:
    assert read_verdict(reply) == gets


def test_both_orders_are_asked(tmp_path: Path) -> None:
    contests = [contest("long answer", "short"), contest("x", "xx"), contest("ab", "cd"), contest("same", "same")]
    with judging(by_length) as server:
        verdicts = judge(JudgeClient(server.url, "m"), JudgeAnswers(tmp_path / "a.jsonl"), contests)
    assert verdicts == Verdicts([1.0, 0.0, 0.5, 0.5], [1.0, 0.0, 0.5, 0.5])
    asked = [body["messages"] for body in server.bodies]
    assert len(asked) == 6  # nobody is asked about equal answers
    for first, second in (("long answer", "short"), ("short", "long answer")):
        assert question("p", first, second) in asked


def test_a_judge_that_goes_by_the_order_finds_nothing(tmp_path: Path) -> None:
    contests = [contest(f"a{i}", f"b{i}") for i in range(20)]
    with judging(lambda *_: "Verdict: A") as server:
        verdicts = judge(JudgeClient(server.url, "m"), JudgeAnswers(tmp_path / "a.jsonl"), contests)
    figures = judge_figures(("one", "two"), contests, verdicts, HOW)
    assert figures.win_rate.value == 0.5 and figures.test.p == 1.0 and figures.ties == 20
    assert figures.first_favoured == 1.0 and figures.consistent == 0.0


def test_how_a_judge_judges_is_told_of_what_it_was_asked() -> None:
    contests = [contest("one", "two", "p"), *(contest("same", "same", f"p{i}") for i in range(9))]
    verdicts = Verdicts([1.0, *[0.5] * 9], [0.0, *[0.5] * 9])  # by the order alone, where it was asked
    figures = judge_figures(("one", "two"), contests, verdicts, HOW)
    assert (figures.consistent, figures.first_favoured, figures.ties, figures.asked) == (0.0, 1.0, 10, 1)
    nobody = judge_figures(("one", "two"), contests[1:], Verdicts([0.5] * 9, [0.5] * 9), HOW)
    assert (nobody.consistent, nobody.first_favoured, nobody.ties, nobody.asked) == (None, None, 9, 0)


def test_replies_without_a_verdict_are_left_out(tmp_path: Path) -> None:
    contests = [contest("aaa", "b"), contest("c", "dd", "odd"), contest("ee", "f")]
    with judging(lambda p, a, b: "I cannot say." if p == "odd" and a == "c" else by_length(p, a, b)) as server:
        verdicts = judge(JudgeClient(server.url, "m"), JudgeAnswers(tmp_path / "a.jsonl"), contests)
    assert verdicts.first_read == [1.0, None, 1.0]
    figures = judge_figures(("one", "two"), contests, verdicts, HOW)
    assert (figures.contests, figures.unread, figures.wins, figures.losses) == (2, 1, 2, 0)
    nothing = judge_figures(("one", "two"), contests[1:2], Verdicts([None], [0.0]), HOW)
    assert nothing.win_rate is None and nothing.test is None and nothing.unread == 1


FILTERED = (400, '{"error": {"message": "a filter stopped the prompt"}}')
CUT = (200, '{"choices": [{"message": {"content": null}, "finish_reason": "content_filter"}]}')


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        (FILTERED, "answers 400: a filter stopped the prompt"),
        ((403, "flagged"), "answers 403: flagged"),
        ((413, ""), "answers 413: Request Entity Too Large"),
        (CUT, "gives none: the answer has no text; finish_reason is 'content_filter'"),
    ],
)
def test_a_question_that_is_refused_costs_its_contest_alone(
    refusal: tuple[int, str], said: str, tmp_path: Path
) -> None:
    contests = [Contest(f"p{i}", "a" * (i + 1), "bb", i + 1, 2, i == 2, False, 10 + i) for i in range(4)]
    path = tmp_path / "answers.jsonl"
    with judging(lambda p, a, b: refusal if (p, a) == ("p2", "bb") else by_length(p, a, b)) as server:
        client = JudgeClient(server.url, "m")
        verdicts = judge(client, JudgeAnswers(path), contests)
        assert verdicts == Verdicts([0.0, 0.5, 1.0, 1.0], [0.0, 0.5, None, 1.0], {2: said})
        figures = judge_figures(("one", "two"), contests, verdicts, HOW)
        assert (figures.contests, figures.unread, figures.refused) == (3, 0, [Refusal(12, said)])
        assert figures.cut == (0, 0), "of those that were judged"
        # It is asked again, alone; and that it is refused again is no reason to stop.
        before = len(server.bodies)
        assert judge(client, JudgeAnswers(path), contests) == verdicts and len(server.bodies) == before + 1
        server.verdict = by_length
        assert judge(client, JudgeAnswers(path), contests).refused == {} and len(server.bodies) == before + 2


@pytest.mark.parametrize(("count", "asked"), [(2, 4), (30, 10)])
def test_a_judge_that_refuses_everything_is_no_judge(count: int, asked: int, tmp_path: Path) -> None:
    contests = [contest("a", "bb", f"p{i}") for i in range(count)]
    with judging(lambda *_: (400, '{"error": {"message": "temperature must be 1"}}')) as server:
        client = JudgeClient(server.url, "m")
        told = f"answers 400: temperature must be 1. It has refused all {asked} questions that it was asked"
        with pytest.raises(JudgeError, match=told):
            judge(client, JudgeAnswers(tmp_path / "a.jsonl"), contests, workers=1)
        assert len(server.bodies) == asked


def test_answers_are_kept_by_content(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.jsonl"
    contests = [contest(f"{'x' * i}a", "b" * 5, f"p{i}") for i in range(6)]
    with judging(by_length) as server:
        client = JudgeClient(server.url, "m", key="some-secret-key-1")
        first = judge(client, JudgeAnswers(path), contests)
        count = len(server.bodies)
        assert count == 12 and judge(client, JudgeAnswers(path), contests) == first and len(server.bodies) == count
        # Another prompt, judge or temperature is another question.
        judge(client, JudgeAnswers(path), [contest("a", "bbbbb", "new"), *contests])
        assert len(server.bodies) == count + 2
        judge(JudgeClient(server.url, "other"), JudgeAnswers(path), contests[:1])
        judge(JudgeClient(server.url, "m", temperature=1.0), JudgeAnswers(path), contests[:1])
        assert len(server.bodies) == count + 6
    text = path.read_text()
    assert all(set(json.loads(line)) == {"key", "reply"} for line in text.splitlines()) and "secret" not in text


def test_a_kill_costs_the_line_that_was_written(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    contests = [contest("a" * (i + 1), "bb", f"p{i}") for i in range(5)]
    with judging(by_length) as server:
        client = JudgeClient(server.url, "m")
        whole = judge(client, JudgeAnswers(path), contests)
        content = path.read_bytes()
        for cut in (1, 20, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:cut])
            before, lines = len(server.bodies), content[:cut].count(b"\n")
            assert judge(client, JudgeAnswers(path), contests) == whole
            # A whole line that lacks its end alone is an answer as well.
            assert len(server.bodies) - before in (10 - lines, 9 - lines)
            assert len(JudgeAnswers(path)) == 10
        path.write_bytes(b'\xff\x00[]\n{"key": 1}\nnull\n' + content)
        assert len(JudgeAnswers(path)) == 10


def test_what_was_answered_before_a_failure_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    contests = [contest("a" * (i + 1), "bb", f"p{i}") for i in range(4)]
    with judging(by_length) as server:
        client = JudgeClient(server.url, "m", sleep=lambda _: None)
        answered: list[int] = []

        def fails_then(prompt: str, a: str, b: str) -> str:
            answered.append(1)
            if len(answered) == 3:
                server.failures.append((401, {}, "revoked"))
            return by_length(prompt, a, b)

        server.verdict = fails_then
        with pytest.raises(JudgeError, match="answers 401: revoked"):
            judge(client, JudgeAnswers(path), contests, workers=1)
        assert len(JudgeAnswers(path)) == 3
        again = judge(JudgeClient(server.url, "m"), JudgeAnswers(path), contests, workers=1)
        assert len(answered) == 8 and again.first_read == [0.0, 0.5, 1.0, 1.0]


def test_answers_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(JudgeError, match="cannot be read"):
        JudgeAnswers(tmp_path)
    answers = JudgeAnswers(tmp_path / "a.jsonl")
    answers.path = Path("/proc/no/such/answers.jsonl")
    with pytest.raises(JudgeError, match="could not be written"):
        answers.keep("k", "r")
    assert answers.get("k") is None


def test_the_key_is_of_all_that_an_answer_depends_on() -> None:
    keys = {
        key_of({"model": model, "temperature": t}, question(p, a, "b"))
        for model in ("m", "n")
        for t in (0.0, None)
        for p in ("p", "q")
        for a in ("a", "")
    }
    assert len(keys) == 16


# --------------------------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------------------------


def drawn(chances: np.ndarray, rng: random.Random) -> Verdicts:
    """Verdicts of a judge that prefers the first side with these chances, each time it reads."""
    return Verdicts(*([float(rng.random() < chance) for chance in chances] for _ in range(2)))


def figures(chances: np.ndarray, seed: int) -> JudgeFigures:
    contests = [contest("x" * (1 + i % 7), "y" * 4) for i in range(len(chances))]
    return judge_figures(("one", "two"), contests, drawn(chances, random.Random(seed)), Resampling(200, seed=seed))


def test_win_rates_hold_the_truth_and_equal_sides_do_not_differ() -> None:
    z = np.linspace(-12, 12, 20_001)
    truth = np.average(1 / (1 + np.exp(-(0.6 + 1.5 * z))), weights=np.exp(-z * z / 2))
    rng = np.random.default_rng(0)
    trials, held, found = 100, 0, 0
    for seed in range(trials):
        chances = 1 / (1 + np.exp(-rng.normal(0.6, 1.5, 60)))
        rate = figures(chances, seed).win_rate
        held += rate.low <= truth <= rate.high
        found += figures(np.full(60, 0.5), seed).test.p < 0.05
    assert held >= 0.89 * trials and found <= 0.1 * trials  # 95 % less, and 5 % and more, than by three errors


def test_a_judge_that_goes_by_length_finds_nothing_at_equal_lengths() -> None:
    rng = np.random.default_rng(1)
    contests = [contest("x" * int(n), "y" * 20) for n in rng.integers(15, 40, 200)]
    reads = [1.0 if c.first_tokens > 20 else 0.0 if c.first_tokens < 20 else 0.5 for c in contests]
    found = judge_figures(("one", "two"), contests, Verdicts(list(reads), list(reads)), HOW)
    assert found.win_rate.low > 0.6 and found.longer > 0.6
    assert found.length_controlled.low < 0.55 < found.win_rate.value
