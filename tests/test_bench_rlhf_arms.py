"""The baselines of the RLHF benchmark: their estimators against what is obviously right, and a task that they solve."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from rlhf_ledger import Ledger, forward_flops, sampling_flops
from rlhf_optimizer import Optimizer
from rlhf_ppo import PPOOptions, estimate_advantages, normalised, policy_loss, token_rewards, train_ppo, value_loss
from rlhf_reward_model import RewardModel, fit_reward_model, pair_loss
from rlhf_rloo import EACH, leave_one_out, sequence_loss, sequence_rewards, train_rloo
from rlhf_rollouts import Rollouts, steps_fed
from rlhf_rows import Rows, by_length, completion_logps
from rlhf_run import Run, Settings
from rlhf_task import Task, sample_from, sample_pairs
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaModel, PreTrainedTokenizerFast
from trl import RLOOConfig, RLOOTrainer

from fastdpo.demo.language_model import build_model
from fastdpo.demo.sampling import Completion

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ("<|pad|>", "<|end|>", "a", "b", "c", "d", "e", "f")


def share_of_a(completions: list[Completion]) -> list[float]:
    """Up to 8, for nothing but "a"."""
    words = [completion.text.split() for completion in completions]
    return [8 * row.count("a") / max(1, len(row)) for row in words]


@pytest.fixture(scope="module")
def task() -> Task:
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token=WORDS[0], eos_token=WORDS[1], padding_side="left"
    )
    prompts = [f"{first} {second}{third}" for first in "abcdef" for second in "abc" for third in ("", " d", " e f")]
    model = build_model(tokenizer, hidden_size=64, layers=2, seed=0, max_positions=32).eval()
    with torch.no_grad():
        model.model.norm.weight.mul_(0.25)  # a language model nearly without an opinion
    return Task("a", model, tokenizer, prompts, prompts[::5], share_of_a, max_new_tokens=10)


def make_run(task: Task, pairs: int = 0, look: Callable[..., bool] | None = None, **settings: Any) -> Run:
    defaults = {"learning_rate": 1e-3, "beta": 0.1, "batch_size": 64, "steps": 3, "look_every": 1, "seed": 0}
    return Run(
        task,
        sample_pairs(task, pairs, seed=0) if pairs else [],
        Settings(**(defaults | settings)),
        Ledger(),
        look or (lambda step, policy: False),
    )


# --------------------------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------------------------


def draw(task: Task, count: int = 70, seed: int = 0) -> tuple[list[Completion], Any]:
    prompts = [task.prompts[i % len(task.prompts)] for i in range(count)]
    completions, (samples,) = sample_from(task, task.model, prompts, torch.Generator().manual_seed(seed))
    return completions, samples


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


def a_reward_model(task: Task) -> RewardModel:
    model = RewardModel(task.model)
    nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    return model


def test_scores_do_not_depend_on_padding(task):
    model, (_, samples) = a_reward_model(task), draw(task)
    rows = Rows.of_samples(samples)
    scores = model.score(samples)
    with torch.no_grad():
        alone = [model(rows.ids[i : i + 1, : rows.lengths[i]])[0, -1] for i in range(len(rows))]
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
    run = make_run(task, pairs=640)
    model = fit_reward_model(run)
    completions, samples = draw(task, 200, seed=1)
    found, true = model.score(samples), torch.tensor(share_of_a(completions))
    assert torch.corrcoef(torch.stack([found, true]))[0, 1] > 0.8
    assert abs(found.mean()) < 0.2
    assert {name for name, cost in run.ledger.parts.items() if cost.flops} == {"reward model"}


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


# --------------------------------------------------------------------------------------------------------------------
# Whole arms
# --------------------------------------------------------------------------------------------------------------------

ARMS = {"ppo": train_ppo, "rloo": train_rloo}


def mean_reward(task: Task, model: LlamaForCausalLM) -> float:
    completions, _ = sample_from(task, model, task.prompts * 4, torch.Generator().manual_seed(9))
    return sum(task.reward(completions)) / len(completions)


@pytest.mark.parametrize("reward", ["true", "learned"])
@pytest.mark.parametrize("arm", ARMS)
def test_arms_raise_the_true_reward(task, arm, reward):
    before = copy.deepcopy(task.model.state_dict())
    run = make_run(task, pairs=800 if reward == "learned" else 0, learning_rate=2e-3, steps=12)
    policy = ARMS[arm](run, reward=reward)
    start, end = mean_reward(task, task.model), mean_reward(task, policy)
    assert start < 2 and end > start + 2
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())


@pytest.mark.parametrize("arm", ARMS)
def test_the_same_settings_give_the_same_numbers(task, arm):
    one, other, third = (ARMS[arm](make_run(task, seed=seed), reward="true") for seed in (0, 0, 1))
    assert torch.equal(one.lm_head.weight, other.lm_head.weight)
    assert not torch.equal(one.lm_head.weight, third.lm_head.weight)


@pytest.mark.parametrize("arm", ARMS)
def test_looks_come_at_the_start_and_in_between_and_end_the_run(task, arm):
    steps: list[int] = []

    def look(step: int, policy: LlamaForCausalLM) -> bool:
        steps.append(step)
        return step >= 4

    ARMS[arm](make_run(task, look=look, steps=9, look_every=2), reward="true")
    assert steps == [0, 2, 4]


def test_a_batch_has_whole_groups(task):
    with pytest.raises(ValueError, match="batch_size is 62; it should be a multiple of 4"):
        train_rloo(make_run(task, batch_size=62), reward="true")


def test_completions_that_were_cut_are_worth_no_more_than_the_worst(task):
    run = make_run(dataclasses.replace(task, max_new_tokens=4), batch_size=128)
    rollout = Rollouts(run, a_reward_model(task)).draw(task.model)
    last = rollout.rows.ids.gather(1, rollout.rows.lengths[:, None] - 1)[:, 0]
    cut = last != task.tokenizer.eos_token_id
    assert 0 < cut.sum() < 128
    assert (rollout.scores[cut] == rollout.scores.min()).all() and rollout.scores[~cut].std() > 0


# --------------------------------------------------------------------------------------------------------------------
# The ledger
# --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", ["true", "learned"])
@pytest.mark.parametrize("arm", ARMS)
def test_the_ledger_has_every_token_that_went_through_a_body(task, arm, reward, monkeypatch):
    seen = [0]
    forward = LlamaModel.forward

    def counted(self: LlamaModel, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen[0] += input_ids.numel()
        return forward(self, input_ids, *args, **kwargs)

    run = make_run(task, pairs=100 if reward == "learned" else 0, steps=2)
    monkeypatch.setattr(LlamaModel, "forward", counted)
    ARMS[arm](run, reward=reward)
    assert seen[0] == sum(sum(cost.tokens.values()) for cost in run.ledger.parts.values())
    expected = {"rollout": {"policy"}, "scoring": {"reference"}, "update": {"policy"}}
    if arm == "ppo":
        expected["value"] = {"value model"}
    if reward == "learned":
        expected["reward model"] = {"reward model"}
        expected["scoring"] = {"reference", "reward model"}
    assert {name: set(cost.tokens) for name, cost in run.ledger.parts.items() if cost.tokens} == expected
    assert all((cost.seconds > 0) == (name in expected) for name, cost in run.ledger.parts.items())


def test_a_step_costs_what_is_counted_by_hand(task):
    """Of PPO with one minibatch of 32 and two epochs: everything in one batch, as long as its longest row."""
    run = make_run(task, batch_size=32, steps=1)
    train_ppo(run, reward="true", options=PPOOptions(epochs=2, minibatches=1))
    rollout = Rollouts(make_run(task, batch_size=32), None).draw(task.model)  # the same draw
    config, parts = task.model.config, run.ledger.parts
    width, scored = rollout.rows.ids.shape[1] - 1, int(rollout.mask.sum())
    once = forward_flops(config, [width] * 32, scored)
    assert parts["scoring"].flops == once and parts["scoring"].tokens == {"reference": 32 * width}
    assert parts["update"].flops == 6 * once and parts["update"].tokens == {"policy": 2 * 32 * width}
    body = forward_flops(config, [width] * 32, 0)
    assert parts["value"].flops == 7 * body and parts["value"].tokens == {"value model": 3 * 32 * width}
    fed = steps_fed(rollout.mask.sum(dim=1))
    prompts = torch.full((32,), int(rollout.rows.prompts.max()))
    assert parts["rollout"].flops == sampling_flops(config, prompts, fed)


def test_rows_leave_the_sampler_when_half_of_it_has_ended():
    # After step 1 one of four has ended, after step 2 two: these go, and so on.
    assert steps_fed(torch.tensor([1, 2, 5, 3])).tolist() == [2, 2, 5, 3]
    assert steps_fed(torch.tensor([1, 4, 4, 4])).tolist() == [4, 4, 4, 4]


# --------------------------------------------------------------------------------------------------------------------
# TRL
# --------------------------------------------------------------------------------------------------------------------


def test_advantages_loss_and_gradient_are_those_of_trl(task, tmp_path):
    """TRL's RLOO trainer is given our completions; it computes all else by itself."""
    run = make_run(task, batch_size=32)
    policy = copy.deepcopy(task.model)
    with torch.no_grad():
        policy.model.norm.weight.mul_(2.0)
    rollout = Rollouts(run, None, each=EACH).draw(policy)
    rows = rollout.rows
    spans = zip(rows.ids.tolist(), rows.prompts.tolist(), rows.lengths.tolist(), strict=True)
    ids = [(row[:prompt], row[prompt:length]) for row, prompt, length in spans]
    prompts = task.tokenizer.batch_decode([prompt for prompt, _ in ids])
    texts = task.tokenizer.batch_decode([text for _, text in ids], skip_special_tokens=True)

    args = RLOOConfig(
        str(tmp_path),
        num_generations=EACH,
        per_device_train_batch_size=32,
        beta=0.3,
        max_completion_length=10,
        gradient_checkpointing=False,
        pad_to_multiple_of=None,
        bf16=False,
        use_cpu=True,
        report_to="none",
    )
    task.model.save_pretrained(tmp_path / "model")  # TRL reads the reference from there
    trainer = RLOOTrainer(
        str(tmp_path / "model"),
        lambda prompts, completions, **_: task.reward([Completion("", text, True) for text in completions]),
        args,
        train_dataset=Dataset.from_dict({"prompt": task.prompts}),
        processing_class=task.tokenizer,
    )
    trainer._generate = lambda _: ([prompt for prompt, _ in ids], [text for _, text in ids], texts)
    trainer.model.load_state_dict(policy.state_dict())
    trainer.model.train()
    inputs = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in prompts])
    advantages = leave_one_out(sequence_rewards(rollout, beta=0.3), EACH)
    torch.testing.assert_close(inputs["advantages"], advantages, atol=1e-4, rtol=1e-4)

    # One update later, so that ratios are not 1, and some are clipped.
    for model in (trainer.model, policy):
        Optimizer(model, 0.1).update(completion_logps(model, rows).sum(dim=1).mean())
    theirs = trainer._compute_loss(trainer.model, inputs)
    theirs.backward()
    logps, old_logps = completion_logps(policy, rows).sum(dim=1), rollout.logps.sum(dim=1)
    ours = sequence_loss(logps, old_logps, advantages, clip=0.2)
    policy.zero_grad()
    ours.backward()
    far = ((logps - old_logps).exp() - 1).abs() > 0.2
    assert 0 < far.sum() < 32
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.grad, trainer.model.get_parameter(name).grad, atol=1e-4, rtol=1e-3)
