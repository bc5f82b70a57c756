"""The exact tier of the RLHF benchmark: that what it sums is everything, and that its frontier is one."""

from __future__ import annotations

import itertools
import math
from itertools import pairwise

import pytest
import torch
from against_rlhf.exact import ExactTier, Point
from against_rlhf.exact_task import LETTERS, LONGEST, PROMPTS, REWARD_SD, letter_tokenizer, make_exact_task
from against_rlhf.task import Task, sample_from
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from fastdpo.demo.language_model import build_model
from fastdpo.demo.sampling import Completion, completion_log_probs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def task() -> Task:
    """Its model is little trained: it puts some weight on everything, cut sequences and padding included."""
    return make_exact_task(0, corpus_size=640, steps=20)


@pytest.fixture(scope="module")
def tier(task: Task) -> ExactTier:
    return ExactTier(task)


def other_model(task: Task, seed: int) -> LlamaForCausalLM:
    return build_model(task.tokenizer, hidden_size=64, layers=1, seed=seed, max_positions=16).eval()


# --------------------------------------------------------------------------------------------------------------------
# The task
# --------------------------------------------------------------------------------------------------------------------


@given(st.sampled_from(PROMPTS), st.text(LETTERS, max_size=LONGEST))
def test_texts_and_tokens_tell_each_other(prompt, text):
    tokenizer = letter_tokenizer()
    ids = tokenizer(prompt + text)["input_ids"]
    assert len(ids) == 2 + len(text)
    assert ids[:2] == tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(ids) == prompt + text
    assert tokenizer.decode(ids[2:] + [tokenizer.eos_token_id], skip_special_tokens=True) == text


def test_reward_is_a_sum_over_letters_and_neighbours_and_lowest_where_cut(task):
    reward, prompt = task.reward, PROMPTS[1]
    terms = sum(reward.terms[prompt, piece] for piece in ("b", "b", "d", "bb", "bd"))
    assert reward([Completion(prompt, "bbd", True)]) == [pytest.approx(REWARD_SD * (terms - reward.mean) / reward.sd)]
    texts = ["".join(text) for length in range(LONGEST + 1) for text in itertools.product(LETTERS, repeat=length)]
    all_rewards = [reward([Completion(p, text, True) for text in texts]) for p in PROMPTS]
    assert reward([Completion(prompt, "bbdbb", False)]) == [min(map(min, all_rewards))]
    assert len({tuple(rewards) for rewards in all_rewards}) == len(PROMPTS)  # prompts want different things


# --------------------------------------------------------------------------------------------------------------------
# The enumeration
# --------------------------------------------------------------------------------------------------------------------


def test_every_sequence_is_there_once_and_they_add_up_to_one(task, tier):
    others = len(task.tokenizer) - 1  # than the end
    count = sum(others**length for length in range(LONGEST + 1)) + others ** (LONGEST + 1)
    assert tier.tokens.shape == (count, LONGEST + 1)
    # One sequence in the place of another would show in one of the sums.
    for model in (task.model, other_model(task, 1)):
        torch.testing.assert_close(tier.logps(model).exp().sum(1), torch.ones(len(PROMPTS), dtype=torch.float64))


def test_log_probabilities_are_those_of_plain_forwards(task, tier):
    logps = tier.logps(task.model)
    for prompt, text, ended in [
        (0, "", True),
        (1, "c", True),
        (2, "dab", True),
        (3, "abcd", True),
        (0, "bbbbb", False),
    ]:
        context, ids = (task.tokenizer(x)["input_ids"] if x else [] for x in (PROMPTS[prompt], text))
        ids = ids + [task.tokenizer.eos_token_id] * ended
        with torch.no_grad():
            steps = task.model(torch.tensor([context + ids])).logits[0].double().log_softmax(-1)
        expected = sum(steps[len(context) + i - 1, token] for i, token in enumerate(ids))
        padded = ids + [task.tokenizer.pad_token_id] * (LONGEST + 1 - len(ids))
        same = (tier.tokens == torch.tensor(padded)).all(1) & (tier.ended == ended)
        assert same.sum() == 1
        # float32 activations of two layers, in sums over at most 192 terms of another order.
        torch.testing.assert_close(logps[prompt, same], expected[None], rtol=1e-4, atol=1e-4)


def test_measures_agree_with_samples(task, tier):
    """By Bernstein's inequality, with the exact variance and range; a right program fails with chance 4e-6 or less."""
    policy, count = other_model(task, 3), 4096
    point = tier.measure(policy)
    logps = tier.logps(policy)
    completions, batches = sample_from(
        task, policy, PROMPTS * (count // len(PROMPTS)), torch.Generator().manual_seed(0)
    )
    reference = torch.cat(
        [(completion_log_probs(task.model, b).gather(2, b.tokens[..., None])[..., 0] * b.mask).sum(1) for b in batches]
    )
    ratios = torch.cat([batch.logps.sum(1) for batch in batches]) - reference
    rewards = torch.tensor(task.reward(completions), dtype=torch.float64)
    for estimate, exact, values in [
        (rewards.mean(), point.reward, tier.rewards),
        (ratios.double().mean(), point.kl, logps - tier.ref_logps),
    ]:
        # Prompts take turns, so that the mean over them has no variance; the variance within them is what is left.
        means = (logps.exp() * values).sum(1, keepdim=True)
        variance = (logps.exp() * (values - means) ** 2).sum(1).mean()
        furthest = (values - means).abs().max()
        chance = math.log(2 / 2e-6)
        bound = (2 * variance * chance / count).sqrt() + 2 * furthest * chance / (3 * count)
        assert abs(estimate - exact) <= bound < 1.0


def test_prompts_of_different_lengths_are_refused(task):
    longer = Task(**{**vars(task), "held_out": [PROMPTS[0], PROMPTS[0] + "a"]})
    with pytest.raises(ValueError, match=r"prompts have \[2, 3\] tokens"):
        ExactTier(longer)


# --------------------------------------------------------------------------------------------------------------------
# The frontier
# --------------------------------------------------------------------------------------------------------------------


def test_the_frontier_rises_and_its_slope_is_beta(tier):
    betas = [2.0**power for power in range(5, -6, -1)]
    points = tier.frontier(betas)
    for (high, a), (low, b) in pairwise(zip(betas, points, strict=True)):
        assert b.kl > a.kl and b.reward > a.reward
        # Concave: between two optima the slope lies between their betas.
        assert low <= (b.reward - a.reward) / (b.kl - a.kl) <= high


def test_the_ends_of_the_frontier(task, tier):
    assert tier.start.kl == 0
    near = tier.optimum(1e6)
    assert near.reward == pytest.approx(tier.measure(task.model).reward, abs=1e-4)
    assert near.kl == pytest.approx(0, abs=1e-9)
    far = tier.optimum(1e-3)
    assert far.reward == pytest.approx(tier.rewards.amax(1).mean().item())
    highest = tier.rewards == tier.rewards.amax(1, keepdim=True)
    chance = (tier.ref_logps.exp() * highest).sum(1)
    assert far.kl == pytest.approx(-chance.log().mean().item(), rel=1e-6)
    assert far.reward == pytest.approx(tier.best.reward) and far.kl == pytest.approx(tier.best.kl, rel=1e-6)


@settings(max_examples=20)  # each takes some hundred optima
@given(st.floats(0.02, 100))
def test_an_optimum_has_no_gap(tier, beta):
    point = tier.optimum(beta)
    assert tier.gap(point) == pytest.approx(0, abs=1e-9)
    worse = Point(point.reward - 0.1 * (tier.best.reward - tier.start.reward), point.kl)
    assert tier.gap(worse) == pytest.approx(0.1, abs=1e-9)


def test_no_policy_is_above_the_frontier(task, tier):
    assert tier.gap(tier.measure(task.model)) == pytest.approx(0, abs=1e-6)
    for seed in range(5):
        assert tier.gap(tier.measure(other_model(task, seed))) > 0
    assert tier.reward_at(10 * tier.best.kl) == tier.best.reward
