"""What RLHF's arms are made of, in the benchmark: each against what is obviously right."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from against_rlhf.ppo import estimate_advantages, normalised, policy_loss, token_rewards, value_loss
from against_rlhf.reward_model import fit_reward_model, pair_loss
from against_rlhf.rloo import leave_one_out, sequence_loss, sequence_rewards
from against_rlhf.rollouts import Rollouts
from against_rlhf.rows import Rows, by_length, completion_logps
from against_rlhf.task import Task
from rlhf_words import a_reward_model, draw, make_run, share_of_a, word_task
from torch import Tensor

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def task() -> Task:
    return word_task()


# --------------------------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------------------------


def test_rows_hold_what_was_sampled(task):
    _, samples = draw(task)
    rows = Rows.of_samples(samples)
    assert len(rows) == 70 and rows.ids.shape[1] == rows.lengths.max()
    assert torch.equal(rows.mask(), samples.mask)
    assert torch.equal(rows.completions()[samples.mask], samples.tokens[samples.mask])
    for i in range(len(rows)):
        prompt = samples.prompt_ids[i][samples.prompt_mask[i].bool()]
        row = torch.cat([prompt, samples.tokens[i][samples.mask[i]]])
        assert torch.equal(rows.ids[i, : rows.lengths[i]], row) and rows.prompts[i] == len(prompt)


def test_log_probabilities_are_those_of_the_sampler(task):
    """Which had a cache, padding on the left and other rows beside each."""
    _, samples = draw(task)
    rows = Rows.of_samples(samples)
    with torch.no_grad():
        together = by_length(lambda some: completion_logps(task.model, some), rows)
        alone = completion_logps(task.model, rows)
    torch.testing.assert_close(together, samples.logps, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(alone, samples.logps, atol=1e-5, rtol=1e-5)


def test_batches_of_similar_length_come_back_in_order(task):
    _, samples = draw(task)
    rows = Rows.of_samples(samples)
    assert torch.equal(by_length(lambda some: some.lengths.float(), rows), rows.lengths.float())
    assert torch.equal(by_length(lambda some: some.completions() * some.mask(), rows), rows.completions() * rows.mask())


# --------------------------------------------------------------------------------------------------------------------
# The reward model
# --------------------------------------------------------------------------------------------------------------------


def test_scores_do_not_depend_on_padding(task):
    model, (_, samples) = a_reward_model(task), draw(task)
    rows = Rows.of_samples(samples)
    scores = model.score(samples)
    with torch.no_grad():
        numbers = [model(rows.ids[i : i + 1, : rows.lengths[i]])[0] for i in range(len(rows))]
    alone = [of_row[prompt:].mean() for of_row, prompt in zip(numbers, rows.prompts, strict=True)]
    torch.testing.assert_close(scores, torch.stack(alone), atol=1e-5, rtol=1e-5)
    assert scores.std() > 0.1


def test_gradients_of_the_pair_loss_do_not_depend_on_padding(task):
    _, samples = draw(task, 40)
    rows = Rows.of_samples(samples)
    one, other = a_reward_model(task), a_reward_model(task)
    pair_loss(by_length(one.of_rows, rows)).backward()
    for i in range(20):
        chosen, rejected = (other.of_rows(rows.take(torch.tensor([row]))) for row in (i, i + 20))
        (-(chosen - rejected).sigmoid().log().mean() / 20).backward()
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-5, rtol=1e-4)


def test_the_reward_model_learns_the_reward_and_is_centred(task):
    run = make_run(task, pairs=2_000)
    model = fit_reward_model(run)
    completions, samples = draw(task, 200, seed=1)
    # It is shown whole texts alone.
    found, true = model.score(samples)[samples.ended], torch.tensor(share_of_a(completions))[samples.ended]
    assert torch.corrcoef(torch.stack([found, true]))[0, 1] > 0.3
    assert abs(found.mean()) < 0.2
    assert {name for name, cost in run.ledger.parts.items() if cost.flops} == {"reward model"}


def test_runs_of_a_seed_share_a_reward_model_and_each_owes_its_cost(task, tmp_path):
    first, second, other = (
        dataclasses.replace(make_run(task, pairs=40, seed=seed), shared=tmp_path) for seed in (0, 0, 1)
    )
    models = [fit_reward_model(run) for run in (first, second, other)]
    assert first.ledger.snapshot() == second.ledger.snapshot()
    assert second.ledger.parts["reward model"].seconds > 0
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(models[0].head.weight, models[2].head.weight)


# --------------------------------------------------------------------------------------------------------------------
# Estimators
# --------------------------------------------------------------------------------------------------------------------


def ragged(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards and values, float64 [5, 7], with their mask: 0 beyond the ends."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(7) < torch.tensor([7, 1, 3, 6, 2])[:, None]
    rewards, values = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64) * mask
    return rewards, values, mask


@pytest.mark.parametrize("decay", [0.0, 0.95, 1.0])
def test_advantages_are_the_double_sum(decay):
    rewards, values, mask = ragged()
    expected = torch.zeros_like(rewards)
    for row, length in enumerate(mask.sum(dim=1).tolist()):
        v = [*values[row, :length].tolist(), 0.0]
        for t in range(length):
            deltas = [rewards[row, t + k].item() + v[t + k + 1] - v[t + k] for k in range(length - t)]
            expected[row, t] = sum(decay**k * delta for k, delta in enumerate(deltas))
    torch.testing.assert_close(estimate_advantages(rewards, values, mask, decay), expected)


def test_without_decay_advantages_are_what_followed_less_the_value():
    rewards, values, mask = ragged()
    following = rewards.flip(1).cumsum(dim=1).flip(1) * mask
    torch.testing.assert_close(estimate_advantages(rewards, values, mask, decay=1.0), following - values)


def test_normalised_advantages_look_at_tokens_alone():
    advantages, _, mask = ragged()
    made = normalised(advantages, mask)
    torch.testing.assert_close(made[mask].mean(), made.new_tensor(0.0))
    torch.testing.assert_close(made[mask].std(), made.new_tensor(1.0))
    assert (made[~mask] == 0).all()


def test_each_completion_is_compared_with_the_others_of_its_prompt():
    rewards = torch.tensor([1.0, 2.0, 3.0, 6.0, 0.0, 0.0, 0.0, 4.0])
    expected = [1 - 11 / 3, 2 - 10 / 3, 3 - 3.0, 6 - 2.0, -4 / 3, -4 / 3, -4 / 3, 4.0]
    torch.testing.assert_close(leave_one_out(rewards, 4), torch.tensor(expected))


def test_the_penalty_is_spread_over_tokens_and_adds_up_to_that_of_the_sequence(task):
    run = make_run(task)
    policy = copy.deepcopy(task.model)
    with torch.no_grad():
        policy.model.norm.weight.mul_(2.0)
    rollout = Rollouts(run, None).draw(policy)
    per_token = token_rewards(rollout, beta=0.3)
    torch.testing.assert_close(per_token.sum(dim=1), sequence_rewards(rollout, beta=0.3), atol=1e-5, rtol=1e-5)
    log_ratio = (rollout.logps - rollout.ref_logps).sum(dim=1)
    assert log_ratio.mean() > 0.1  # it is a policy of its own
    torch.testing.assert_close(sequence_rewards(rollout, 0.3), rollout.scores - 0.3 * log_ratio)
    assert (per_token[~rollout.mask] == 0).all()
    first = rollout.mask.sum(dim=1) > 1
    torch.testing.assert_close(per_token[first, 0], -0.3 * (rollout.logps - rollout.ref_logps)[first, 0])


# --------------------------------------------------------------------------------------------------------------------
# Losses
# --------------------------------------------------------------------------------------------------------------------


def test_at_ratio_one_the_gradient_is_that_of_the_plain_policy_gradient():
    advantages, logps, mask = ragged()
    clipped, plain = logps.clone().requires_grad_(), logps.clone().requires_grad_()
    policy_loss(clipped, logps, advantages, mask, clip=0.2).backward()
    (-(advantages * plain)[mask].mean()).backward()
    torch.testing.assert_close(clipped.grad, plain.grad)

    clipped, plain = logps[:, 0].clone().requires_grad_(), logps[:, 0].clone().requires_grad_()
    sequence_loss(clipped, logps[:, 0], advantages[:, 0], clip=0.2).backward()
    (-(advantages[:, 0] * plain).mean()).backward()
    torch.testing.assert_close(clipped.grad, plain.grad)


@pytest.mark.parametrize(
    ("ratio", "advantage", "gain", "slope"),
    [(1.5, 2.0, 2.4, 0.0), (1.5, -2.0, -3.0, -3.0), (0.5, 2.0, 1.0, 1.0), (0.5, -2.0, -1.6, 0.0), (1.1, 2.0, 2.2, 2.2)],
)
def test_clipping_ends_what_more_of_the_same_would_gain(ratio, advantage, gain, slope):
    """``slope`` is the gain's derivative by the log-probability."""
    logps = torch.tensor([[ratio]]).log().requires_grad_()
    zero, advantages = torch.zeros(1, 1), torch.tensor([[advantage]])
    loss = policy_loss(logps, zero, advantages, torch.ones(1, 1, dtype=torch.bool), clip=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(-gain) and logps.grad.item() == pytest.approx(-slope)
    assert sequence_loss(logps[0], zero[0], advantages[0], clip=0.2).item() == pytest.approx(-gain)


@pytest.mark.parametrize(("value", "loss", "slope"), [(0.9, 0.5 * 0.8**2, 0.0), (0.2, 0.5 * 0.8**2, -0.8)])
def test_a_value_gains_nothing_by_going_further_than_the_clip(value, loss, slope):
    """The return is 1 and the old value 0; at 0.9 and a clip of 0.2 the nearer value, 0.2, is what counts."""
    values = torch.tensor([[value]], requires_grad=True)
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    found = value_loss(values, zero, one, one.bool(), clip=0.2)
    found.backward()
    assert found.item() == pytest.approx(loss)
    assert values.grad.item() == pytest.approx(slope)
