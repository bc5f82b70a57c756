"""RLHF's arms in the benchmark: a task that they solve, what they cost, and TRL's trainer on the same completions."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from against_rlhf.ledger import forward_flops, sampling_flops
from against_rlhf.optimizer import Optimizer
from against_rlhf.ppo import PPOOptions, train_ppo
from against_rlhf.rloo import EACH, leave_one_out, sequence_loss, sequence_rewards, train_rloo
from against_rlhf.rollouts import Rollouts, steps_fed
from against_rlhf.rows import completion_logps
from against_rlhf.task import Task, sample_from
from datasets import Dataset
from rlhf_words import a_reward_model, make_run, word_task
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaModel
from trl import RLOOConfig, RLOOTrainer

from fastdpo.demo.sampling import Completion

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def task() -> Task:
    return word_task()


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
    run = make_run(task, pairs=2_000 if reward == "learned" else 0, learning_rate=2e-3, steps=12)
    policy = ARMS[arm](run, reward=reward)
    start, end = mean_reward(task, task.model), mean_reward(task, policy)
    # Of what a model learns from 2,000 noisy labels, a part is true.
    assert start < 2 and end > start + (2.0 if reward == "true" else 0.5)
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
        model.zero_grad()
    theirs = trainer._compute_loss(trainer.model, inputs)
    theirs.backward()
    logps, old_logps = completion_logps(policy, rows).sum(dim=1), rollout.logps.sum(dim=1)
    ours = sequence_loss(logps, old_logps, advantages, clip=0.2)
    ours.backward()
    far = ((logps - old_logps).exp() - 1).abs() > 0.2
    assert 0 < far.sum() < 32
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter.grad, trainer.model.get_parameter(name).grad, atol=1e-4, rtol=1e-3)
