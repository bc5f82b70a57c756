"""DPO's arms of the RLHF benchmark: that they take the same steps, approach the frontier, and count what they do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

import pytest
import torch
from against_rlhf.dpo import (
    REFERENCE_BATCH,
    train_dpo_eager,
    train_dpo_fastdpo,
    train_dpo_trl,
    training_pairs,
)
from against_rlhf.exact import ExactTier, approach
from against_rlhf.exact_task import make_exact_task
from against_rlhf.forwards import body_flops
from against_rlhf.ledger import Ledger, forward_flops
from against_rlhf.run import Run, Settings
from against_rlhf.task import Task, sample_pairs
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from fastdpo.demo.preferences import Preference
from fastdpo.model.tree import LEAST_SHARED

pytestmark = pytest.mark.usefixtures("one_thread")

T = TypeVar("T")
ARMS = {"eager": train_dpo_eager, "trl": train_dpo_trl, "fastdpo": train_dpo_fastdpo}
SETTINGS = Settings(learning_rate=1e-3, beta=0.5, batch_size=8, steps=6, look_every=1, seed=0)


@pytest.fixture(scope="module")
def task() -> Task:
    return make_exact_task(0, corpus_size=1280, steps=60)


@pytest.fixture(scope="module")
def pairs(task: Task) -> list[Preference]:
    return sample_pairs(task, 44, seed=0)


def batched(values: list[T], size: int) -> list[list[T]]:
    return [values[start : start + size] for start in range(0, len(values), size)]


def make_run(
    task: Task,
    pairs: list[Preference],
    settings: Settings = SETTINGS,
    look: Callable[[int, LlamaForCausalLM], bool] = lambda *_: False,
) -> Run:
    return Run(task, pairs, settings, Ledger(), look)


# --------------------------------------------------------------------------------------------------------------------
# The steps
# --------------------------------------------------------------------------------------------------------------------


def dpo_loss(tier: ExactTier, policy: Tensor, pairs: list[Preference], beta: float) -> float:
    """Of log-probabilities of all sequences, float64 [P, S]."""
    tokenizer = tier.task.tokenizer
    ratios = policy - tier.ref_logps

    def ratio(prompt: str, text: str) -> Tensor:
        ids = (tokenizer(text)["input_ids"] if text else []) + [tokenizer.eos_token_id]
        ids += [tokenizer.pad_token_id] * (tier.tokens.shape[1] - len(ids))
        (place,) = ((tier.tokens == torch.tensor(ids)).all(1) & tier.ended).nonzero()
        return ratios[tier.task.held_out.index(prompt), place]

    margins = torch.cat([ratio(pair.prompt, pair.chosen) - ratio(pair.prompt, pair.rejected) for pair in pairs])
    return -F.logsigmoid(beta * margins).mean().item()


def test_all_arms_have_the_same_losses_step_by_step(task, pairs):
    """The loss of each step's own batch, of the policy as it is before that step; batches come again in this run."""
    tier, losses = ExactTier(task), {}
    batches = batched(training_pairs(make_run(task, pairs)), SETTINGS.batch_size)
    before = {name: weight.clone() for name, weight in task.model.state_dict().items()}
    for name, train in ARMS.items():
        found: list[float] = []

        def look(steps: int, policy: LlamaForCausalLM, found: list[float] = found) -> bool:
            found.append(dpo_loss(tier, tier.logps(policy), batches[steps % len(batches)], SETTINGS.beta))
            return False

        policy = train(make_run(task, pairs, look=look))
        losses[name] = found
        assert policy is not task.model
        assert len(found) == SETTINGS.steps + 1
    assert len(batches) == 5 < SETTINGS.steps
    assert losses["eager"][0] == pytest.approx(float(torch.tensor(2.0).log()))
    assert losses["eager"][5] < losses["eager"][0] - 0.01  # the first batch, seen once
    for name in ("trl", "fastdpo"):
        assert losses[name] == pytest.approx(losses["eager"], rel=1e-4)
    for name, weight in task.model.state_dict().items():
        assert torch.equal(weight, before[name])


def test_pairs_are_drawn_once_and_grouped_by_length(task, pairs):
    taken = training_pairs(make_run(task, pairs))
    assert len(taken) == 40  # whole batches
    assert taken == training_pairs(make_run(task, pairs))
    remaining = list(pairs)
    for pair in taken:
        remaining.remove(pair)
    assert len(training_pairs(make_run(task, pairs, dataclasses.replace(SETTINGS, steps=3)))) == 24
    other = training_pairs(make_run(task, pairs, dataclasses.replace(SETTINGS, seed=1)))
    assert other != taken
    # Of four batches, each holds what is longer than all of another.
    longest = [[max(len(p.chosen), len(p.rejected)) for p in batch] for batch in batched(taken, SETTINGS.batch_size)]
    pool = sorted(longest[:4])
    assert all(max(a) <= min(b) for a, b in pairwise(pool))
    with pytest.raises(ValueError, match="there are 7 pairs, less than one batch of 8"):
        training_pairs(make_run(task, pairs[:7]))


@pytest.mark.parametrize("name", ARMS)
def test_a_look_can_end_the_run(task, pairs, name):
    seen = []

    def look(steps: int, _: LlamaForCausalLM) -> bool:
        seen.append(steps)
        return steps == 4

    ARMS[name](make_run(task, pairs, dataclasses.replace(SETTINGS, look_every=2), look))
    assert seen == [0, 2, 4]


def test_dpo_approaches_the_frontier():
    # The benchmark's own task: a model that has learned less lets texts run into the limit, of which no pair tells.
    task = make_exact_task(seed=0)
    tier = ExactTier(task)
    settings = Settings(learning_rate=1e-3, beta=2.0, batch_size=128, steps=100, look_every=50, seed=0, decay=True)
    reached = approach(tier, train_dpo_eager, settings, sample_pairs(task, 12_800, seed=1))
    assert [one.steps for one in reached] == [0, 50, 100]
    assert reached[0].gap == pytest.approx(0, abs=1e-6)
    end = reached[-1].point
    # Most of what can be had for this divergence, long before the end of a full run.
    assert end.kl > 0.25 * tier.optimum(settings.beta).kl
    assert end.reward - tier.start.reward > 0.6 * (tier.reward_at(end.kl) - tier.start.reward)


# --------------------------------------------------------------------------------------------------------------------
# The ledger
# --------------------------------------------------------------------------------------------------------------------


def lengths(task: Task, pair: Preference) -> tuple[int, int, int]:
    """Tokens of prompt, chosen and rejected; every letter is one, and so is the end."""
    return len(task.tokenizer(pair.prompt)["input_ids"]), len(pair.chosen) + 1, len(pair.rejected) + 1


def padded_width(task: Task, batch: list[Preference]) -> int:
    return max(p + max(c, r) for p, c, r in (lengths(task, pair) for pair in batch))


def spent(task: Task, pairs: list[Preference], name: str, last: int) -> Ledger:
    """By a run that ends after ``last`` steps, and whose looks run the policy."""

    def look(steps: int, policy: LlamaForCausalLM) -> bool:
        policy(torch.tensor([[1, 2, 3]]))
        return steps == last

    run = make_run(task, pairs, look=look)
    ARMS[name](run)
    return run.ledger


@pytest.mark.parametrize(("name", "less"), [("eager", 1), ("trl", 0)])
def test_padded_arms_count_rows_of_the_longest(task, pairs, name, less):
    """A plain loop leaves out the last token of a batch, which predicts nothing; TRL does not."""
    config = task.model.config
    ledger = spent(task, pairs, name, last=2)
    taken = training_pairs(make_run(task, pairs))
    rows = 2 * SETTINGS.batch_size
    widths = [padded_width(task, batch) for batch in batched(taken, SETTINGS.batch_size)[:2]]
    update = ledger.parts["update"]
    assert update.tokens == {"policy": sum(rows * (width - less) for width in widths)}
    expected = sum(forward_flops(config, [width - less] * rows, rows * (width - 1)) for width in widths)
    assert update.flops == pytest.approx(3 * expected)

    in_order = sorted(taken, key=lambda pair: padded_width(task, [pair])) if name == "eager" else taken
    batches = batched(in_order, REFERENCE_BATCH)
    tokens = sum(2 * len(batch) * (padded_width(task, batch) - less) for batch in batches)
    assert ledger.parts["reference"].tokens == {"reference": tokens}
    assert all(ledger.parts[part].seconds > 0 for part in ("reference", "update"))


def test_fastdpo_counts_what_it_lays_out(task, pairs):
    """Both sequences whole: the task's prompts are too short to be worth sharing. The reference takes none in vain."""
    config = task.model.config
    two, four = (spent(task, pairs, "fastdpo", last) for last in (2, 4))
    taken = training_pairs(make_run(task, pairs))

    def flops(pair: Preference) -> float:
        prompt, chosen, rejected = lengths(task, pair)
        return forward_flops(config, [prompt + chosen, prompt + rejected], chosen + rejected)

    def tokens(pair: Preference) -> int:
        prompt, chosen, rejected = lengths(task, pair)
        assert prompt < LEAST_SHARED
        return 2 * prompt + chosen + rejected

    # What the trainer checks before it starts is in both runs.
    steps = [pair for batch in batched(taken, SETTINGS.batch_size)[2:4] for pair in batch]
    update = [ledger.parts["update"] for ledger in (two, four)]
    assert update[1].tokens["policy"] - update[0].tokens["policy"] == sum(map(tokens, steps))
    assert update[1].flops - update[0].flops == pytest.approx(3 * sum(map(flops, steps)))
    reference = two.parts["reference"]
    scored = {(pair.prompt, completion) for pair in taken for completion in (pair.chosen, pair.rejected)}
    once = [(len(task.tokenizer(prompt)["input_ids"]), len(completion) + 1) for prompt, completion in scored]
    # A pair of which one completion is known already is asked about again, with both.
    assert sum(map(sum, once)) <= reference.tokens["reference"] <= sum(map(tokens, taken))
    least = sum(forward_flops(config, [sum(one)], one[1]) for one in once)
    assert least <= reference.flops <= sum(map(flops, taken))


def test_operations_of_a_packed_row(task):
    config = task.model.config
    ids = torch.zeros(1, 12, dtype=torch.int64)
    # Prompt of 2, completions of 3 and 1; then prompt of 1, completions of 2 and 3.
    positions = torch.tensor([[0, 1, 2, 3, 4, 2, 0, 1, 2, 1, 2, 3]])
    whole = forward_flops(config, [5, 3, 3, 4], 0) - forward_flops(config, [2, 1], 0)
    assert body_flops(config, ids, positions) == pytest.approx(whole)
    assert body_flops(config, ids.view(3, 4), None) == forward_flops(config, [4, 4, 4], 0)
    assert body_flops(config, ids, torch.arange(12)[None]) == forward_flops(config, [12], 0)
