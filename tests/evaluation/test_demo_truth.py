"""The demo's two models, of which the truth is known: intervals cover it, and models that are equal do not differ.

The models are smaller than the demo's own, and less trained, so that it takes seconds. The pairs are the demo's: two
texts of the base model, of which a simulated person prefers one with a chance that the true reward tells. So the
accuracy that a model has with that person is known without any label: it is a mean of those chances.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace

import numpy as np
import pytest
from datasets import Dataset
from judge_server import judging

from fastdpo.demo.config import QUICK, DemoConfig
from fastdpo.demo.corpus import draw_prompts
from fastdpo.demo.preferences import label_pairs
from fastdpo.demo.reward import true_reward
from fastdpo.demo.stages import align, make_base_model, rng_for, sample_pairs, sample_texts
from fastdpo.evaluation.held_out import read_held_out
from fastdpo.evaluation.judge import Contest, judge_contests, judge_figures
from fastdpo.evaluation.judge_answers import JudgeAnswers
from fastdpo.evaluation.judge_client import JudgeClient
from fastdpo.evaluation.results import figures_of
from fastdpo.evaluation.scores import Evaluated, PairPlaces, PairScores
from fastdpo.evaluation.scoring import ModelScorer
from fastdpo.evaluation.slices import Slice
from fastdpo.evaluation.statistics import Resampling
from fastdpo.trainer import DPOConfig

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")

RESAMPLES, PAIRS, BETA = 300, 150, 0.1
QUICK_DEMO = replace(DemoConfig(**QUICK), eval_prompts=1200)
TINY_DEMO = replace(
    QUICK_DEMO, corpus_size=1500, vocab_size=512, base_steps=250, pairs=300, steps=20, eval_prompts=600
)  # fmt: skip


@dataclass(frozen=True)
class Pool:
    """N pairs of texts, the first of each called the better one.

    Attributes:
        base, aligned: what the models say of (better, worse), as if that were (chosen, rejected).
        chances: [N], that the simulated person prefers the better one.
        texts: (prompt, a text of the base model, one of the aligned model), prompt by prompt.
    """

    base: PairScores
    aligned: PairScores
    chances: np.ndarray
    texts: list[tuple[str, str, str]]

    def labelled(self, rng: np.random.Generator) -> list[PairScores]:
        """Some pairs, with replacement, as the person chose: what both models say of them."""
        drawn = rng.integers(0, len(self.chances), PAIRS)
        turned = rng.random(PAIRS) >= self.chances[drawn]
        return [_turned(scores.at(drawn), turned) for scores in (self.base, self.aligned)]

    def accuracy(self, margins: np.ndarray) -> float:
        """The truth: how often a model that prefers the better texts by so much agrees with the person."""
        agrees = np.where(margins > 0, self.chances, np.where(margins < 0, 1 - self.chances, 0.5))
        return float(agrees.mean())

    def margin(self, margins: np.ndarray) -> float:
        return float(((2 * self.chances - 1) * margins).mean())


def _turned(scores: PairScores, turned: np.ndarray) -> PairScores:
    def mixed(kept: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.where(turned, other, kept)

    return PairScores(
        mixed(scores.chosen_logps, scores.rejected_logps),
        mixed(scores.rejected_logps, scores.chosen_logps),
        mixed(scores.chosen_tokens, scores.rejected_tokens),
        mixed(scores.rejected_tokens, scores.chosen_tokens),
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the accuracies at equal lengths, which are not looked at here."""
    monkeypatch.setattr("fastdpo.evaluation.results.controlled_shares", lambda *_: None)


@pytest.fixture(scope="module", params=["tiny", pytest.param("quick", marks=pytest.mark.slow)])
def pool(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """Of the demo with --quick, or of a smaller one."""
    config = QUICK_DEMO if request.param == "quick" else TINY_DEMO
    held_out = draw_prompts(config.eval_prompts, rng_for(config, "held-out prompts"))
    prompts = draw_prompts(config.pairs, rng_for(config, "training prompts"), exclude=held_out)
    base, tokenizer, _ = make_base_model(config, held_out=held_out)
    pairs = sample_pairs(config, base, tokenizer, prompts)
    first, _ = sample_texts(config, base, tokenizer, held_out, purpose="before")
    second, _ = sample_texts(config, base, tokenizer, held_out, purpose="second")
    ordered = label_pairs(first, second, rng=None)
    aligned = align(config, base, tokenizer, pairs, ordered[:16]).model
    after, _ = sample_texts(config, aligned, tokenizer, held_out[:300], purpose="after")
    args = DPOConfig(str(tmp_path_factory.mktemp("out")), max_length=None, use_cpu=True, disable_tqdm=True)
    rows = [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in ordered]
    read = read_held_out(Dataset.from_list(rows), tokenizer, args)
    kept = [ordered[int(row)] for row in read.pairs().rows]
    scorer = ModelScorer(args)
    return Pool(
        base=scorer.score(base, read, "base"),
        aligned=scorer.score(aligned, read, "aligned"),
        chances=np.array([1 / (1 + math.exp(p.rejected_reward - p.chosen_reward)) for p in kept]),
        texts=[(b.prompt, b.text, a.text) for b, a in zip(first, after, strict=False)],
    )


def figures(base: PairScores, aligned: PairScores, seed: int):
    """Of both models on some pairs, each of a prompt of its own."""
    models = [Evaluated("aligned", "a", aligned, base, "base"), Evaluated("base", "b", base)]
    places = PairPlaces(np.arange(PAIRS), np.arange(PAIRS))
    whole = [Slice("all", "all pairs", np.arange(PAIRS))]
    return figures_of(models, places, whole, BETA, Resampling(400, seed=seed)).slices[0]


def test_intervals_cover_the_known_truth(pool: Pool) -> None:
    likelihood = {name: _margins(getattr(pool, name)) for name in ("base", "aligned")}
    reward = BETA * (likelihood["aligned"] - likelihood["base"])
    assert pool.accuracy(reward) > 0.52  # it has learnt something, so that this is about something
    truth = {
        "reward accuracy": pool.accuracy(reward),
        "reward margin": pool.margin(reward),
        "likelihood accuracy": pool.accuracy(likelihood["aligned"]),
        "likelihood accuracy, base": pool.accuracy(likelihood["base"]),
        "difference of accuracies": pool.accuracy(likelihood["aligned"]) - pool.accuracy(likelihood["base"]),
        "difference of margins": pool.margin(likelihood["aligned"]) - pool.margin(likelihood["base"]),
    }
    held = dict.fromkeys(truth, 0)
    rng = np.random.default_rng(0)
    for seed in range(RESAMPLES):
        found = figures(*pool.labelled(rng), seed)
        aligned, base = found.models
        estimates = (
            aligned.accuracy["reward"],
            aligned.margin["reward"],
            aligned.accuracy["likelihood"],
            base.accuracy["likelihood"],
            found.comparisons[0].accuracy["likelihood"].estimate,
            found.comparisons[0].margin["likelihood"].estimate,
        )
        for (name, value), estimate in zip(truth.items(), estimates, strict=True):
            held[name] += estimate.low <= value <= estimate.high
    # 93 of 100 of all, and of none fewer than by three standard errors below 95 of 100: other machines round otherwise,
    # and train other models.
    assert sum(held.values()) >= 0.93 * RESAMPLES * len(held), held
    assert min(held.values()) >= 0.912 * RESAMPLES, held


def _margins(scores: PairScores) -> np.ndarray:
    return scores.chosen_logps - scores.rejected_logps


def test_identical_models_do_not_differ(pool: Pool) -> None:
    rng = np.random.default_rng(1)
    found = [0, 0]
    for seed in range(RESAMPLES):
        _, aligned = pool.labelled(rng)
        (comparison,) = figures(aligned, aligned, seed).comparisons
        found[0] += comparison.accuracy["likelihood"].test.p < 0.05
        found[1] += comparison.margin["likelihood"].test.p < 0.05
    assert found == [0, 0]


def test_models_that_are_equal_but_for_chance_do_not_differ(pool: Pool) -> None:
    """Which of the two models is called the first is drawn pair by pair: neither is the better one."""
    rng = np.random.default_rng(2)
    found = [0, 0]
    for seed in range(RESAMPLES):
        base, aligned = pool.labelled(rng)
        swap = rng.random(PAIRS) < 0.5
        mixed = [
            PairScores(*(np.where(swap, one, other) for one, other in zip(_fields(a), _fields(b), strict=True)))
            for a, b in ((base, aligned), (aligned, base))
        ]
        (comparison,) = figures(*mixed, seed).comparisons
        found[0] += comparison.accuracy["likelihood"].test.p < 0.05
        found[1] += comparison.margin["likelihood"].test.p < 0.05
    # 5 % of tests find something where there is nothing: three standard errors. McNemar's, in whole numbers, fewer.
    assert found[0] <= 0.05 * RESAMPLES and found[1] <= 0.088 * RESAMPLES, found


def _fields(scores: PairScores) -> list[np.ndarray]:
    return list(vars(scores).values())


def test_a_judge_that_knows_the_reward_finds_the_true_win_rate(
    pool: Pool, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    gains = np.array([true_reward(after) - true_reward(before) for _, before, after in pool.texts])
    truth = float(np.mean(1 / (1 + np.exp(-gains))))
    assert abs(truth - 0.5) > 0.03
    rng = np.random.default_rng(3)
    contests = [Contest(f"{i} {p}", after, before, 1, 1) for i, (p, before, after) in enumerate(pool.texts)]

    def person(prompt: str, a: str, b: str) -> str:
        chance = 1 / (1 + math.exp(true_reward(b) - true_reward(a)))
        draw = np.random.default_rng(zlib.crc32(f"{prompt}\0{a}\0{b}".encode())).random()  # in whatever order
        return "Verdict: A" if draw < chance else "Verdict: B"

    held = 0
    with judging(person) as server:
        client = JudgeClient(server.url, "person")
        for seed in range(3):
            drawn = [contests[i] for i in rng.choice(len(contests), 60, replace=False)]
            answers = JudgeAnswers(tmp_path / f"{seed}.jsonl")
            verdicts = judge_contests(drawn, client, answers, workers=1, label="", show_progress=False)
            rate = judge_figures(("aligned", "base"), drawn, verdicts, Resampling(300, seed=seed)).win_rate
            held += rate.low <= truth <= rate.high
    assert held >= 2
