"""dpo_loss over S sequences: pairs that share them, weights, rankings; against the oracle; and misuse."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from grouped_losses import CLOSE, groups_of, is_grouped
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from loss_batches import Batch, make_batch
from loss_cases import LOSSES, MIX, SORTED, Tokens, has_reference, loss_options
from oracle import ROUNDING
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastdpo import DPOLoss, DPOOutput, dpo_loss
from fastdpo.loss.gather import picked
from fastdpo.loss.oracle import losses, ranking_losses, rewards
from fastdpo.loss.ranking_losses import agreement
from fastdpo.loss.units import halves, units_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OUTPUTS = ("entropy", "mean_logits", "is_top1")
FIELDS = ("hidden", "weight", "bias")


def make_rows(seed: int, rows: int, length: int, h: int, v: int, dtype: torch.dtype, **model: Any) -> Batch:
    """``make_batch``'s first so many rows, of any number."""
    batch = make_batch(seed, (rows + 1) // 2, length, h, v, dtype, **model)
    return select(batch, list(range(rows)))


def select(batch: Batch, rows: list[int]) -> Batch:
    return replace(batch, **{name: getattr(batch, name)[rows] for name in ("hidden", "targets", "ref_hidden")})


@st.composite
def some_pairs(draw: st.DrawFn, rows: int) -> list[tuple[int, int]]:
    """Pairs of different rows, in any order, maybe some twice and some rows in none."""
    row = st.integers(0, rows - 1)
    pair = st.tuples(row, row).filter(lambda two: two[0] != two[1])
    return draw(st.lists(pair, min_size=1, max_size=8))


def completions(tokens: Tokens, rows: list[int], *, with_reference: bool) -> list[Any]:
    whole = sum(tokens.completions(with_reference=with_reference), [])
    return [whole[row] for row in rows]


def repeated(items: list[Any], times: list[int]) -> list[Any]:
    """Each as often as its weight says."""
    return [item for item, n in zip(items, times, strict=True) for _ in range(n)]


def reference_of(batch: Batch, options: dict[str, Any]) -> dict[str, Tensor]:
    if not has_reference(options):
        return {}
    return {"ref_hidden": batch.ref_hidden, "ref_weight": batch.ref_weight, "ref_bias": batch.bias.detach()}


# ------------------------------------------------------------------------------------------- pairs


@pytest.mark.parametrize("loss", (*LOSSES, MIX))
@settings(max_examples=5)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(2, 7),
    length=st.integers(1, 7),
    data=st.data(),
    weighted=st.booleans(),
    packed=st.booleans(),
    grouped=st.booleans(),
    kept=st.sampled_from([0, 5, None]),
)
def test_pairs_match_the_oracle(
    loss: str,
    seed: int,
    rows: int,
    length: int,
    data: st.DataObject,
    weighted: bool,
    packed: bool,
    grouped: bool,
    kept: int | None,
) -> None:
    """In float64. A pair of weight n counts as n pairs do: the oracle gets it n times."""
    options = data.draw(loss_options(loss))
    pairs = data.draw(some_pairs(rows))
    times = data.draw(st.lists(st.integers(0, 3), min_size=len(pairs), max_size=len(pairs))) if weighted else None
    assume(times is None or any(times))
    batch = make_rows(seed, rows, length, 6, 11, torch.float64)
    ours, leaves = batch.with_leaves()
    layout, packed_rows = {}, ours
    if packed:
        packed_rows, layout["cu_seqlens"] = ours.packed()
    given_units = {"pairs": torch.tensor(pairs)}
    if times is not None:
        given_units["weights"] = torch.tensor(times, dtype=torch.float32)
    workspace = None if kept is None else batch.room_for(kept)
    with groups_of(1) if grouped else nullcontext():
        output = dpo_loss(
            **packed_rows.policy(),
            **reference_of(packed_rows, options),
            **layout,
            **given_units,
            **options,
            workspace=workspace,
            outputs=OUTPUTS,
        )
    grads = torch.autograd.grad(output.loss, leaves)

    wide, theirs = batch.with_leaves()
    tokens = wide.tokens()
    with_reference = has_reference(options)
    repeats = [1] * len(pairs) if times is None else times
    chosen, rejected = (
        repeated(completions(tokens, list(side), with_reference=with_reference), repeats)
        for side in zip(*pairs, strict=True)
    )
    values = torch.stack(losses(chosen, rejected, **options))
    expected = torch.autograd.grad(values.mean(), theirs, retain_graph=True)
    # Losses that grow as exponentials of log-probabilities err as much more.
    scale = 1 + float(values.detach().abs().max()) + max(float(grad.abs().max()) for grad in expected)
    torch.testing.assert_close(output.loss, values.mean(), rtol=1e-12, atol=1e-12 * scale)
    for name, grad, truth in zip(FIELDS, grads, expected, strict=True):
        torch.testing.assert_close(grad, truth, rtol=1e-9, atol=1e-11 * scale, msg=name)
    unused = [row for row in range(rows) if all(row not in pair for pair in pairs)]
    assert not grads[0][unused].any()
    if not set(SORTED) & {options["loss_type"] if isinstance(options["loss_type"], str) else options["loss_type"][0]}:
        torch.testing.assert_close(
            repeated(output.losses.tolist(), repeats), values.tolist(), rtol=1e-12, atol=1e-11 * scale
        )
    assert torch.equal(output.pairs, given_units["pairs"])


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(2, 7),
    length=st.integers(1, 9),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
    grouped=st.booleans(),
    kept=st.sampled_from([0, 3, 20, 1000]),
    needs=st.sampled_from([FIELDS, ("hidden",), ("weight", "bias")]),
    packed=st.booleans(),
    tokenwise=st.booleans(),
    loss=st.sampled_from(
        [
            {},
            {"loss_type": "ipo"},
            {"ld_alpha": 0.3, "ld_reference": "policy", "sft_weight": 0.5},
            {"use_weighting": True},
            {"loss_type": ["apo_zero", "sft"], "sft_reduction": "batch"},
            {"loss_type": "aot"},
        ]
    ),
)
def test_shared_sequences_are_repeated_ones(
    seed: int,
    rows: int,
    length: int,
    dtype: torch.dtype,
    data: st.DataObject,
    grouped: bool,
    kept: int,
    needs: tuple[str, ...],
    packed: bool,
    tokenwise: bool,
    loss: dict[str, Any],
) -> None:
    """The same as chosen-first halves in which a sequence stands as often as there are pairs of it; in every dtype."""
    pairs = data.draw(some_pairs(rows))
    batch = make_rows(seed, rows, length, 8, 40, dtype)
    slots = [*(chosen for chosen, _ in pairs), *(rejected for _, rejected in pairs)]
    found = []
    for together in (select(batch, slots), batch):
        ours, leaves = together.with_leaves()
        ours = replace(ours, **{n: getattr(ours, n).detach() for n in FIELDS if n not in needs})
        is_ours = together is batch
        ref_logps = together.ref_logps() if tokenwise else together.ref_logps().sum(1)
        how: dict[str, Any] = {"pairs": torch.tensor(pairs)} if is_ours else {}
        if packed and is_ours and not tokenwise:
            ours, how["cu_seqlens"] = ours.packed()
        with groups_of(1 if grouped and is_ours else 1 << 62):
            output = dpo_loss(
                **ours.policy(), ref_logps=ref_logps, **loss, **how, workspace=batch.room_for(kept), outputs=OUTPUTS
            )
        wanted = [leaf for leaf, name in zip(leaves, FIELDS, strict=True) if name in needs]
        found.append((output, dict(zip(needs, torch.autograd.grad(output.loss, wanted), strict=True))))
    (theirs, their_grads), (output, grads) = found
    if "hidden" in needs:  # of a sequence, what its copies add up to
        wide = torch.zeros_like(batch.hidden, dtype=torch.float64)
        their_grads["hidden"] = wide.index_add_(0, torch.tensor(slots), their_grads["hidden"].double())
    tolerance = CLOSE[dtype]
    for name in ("loss", "losses", "chosen_logps", "rejected_logps", "chosen_rewards", "rejected_rewards", "weights"):
        if getattr(theirs, name) is not None:
            torch.testing.assert_close(
                getattr(output, name), getattr(theirs, name), rtol=tolerance, atol=10 * tolerance
            )
    for name in (*OUTPUTS, "chosen_tokens", "rejected_tokens"):
        ours_of, whole = getattr(output, name), getattr(theirs, name)
        torch.testing.assert_close(
            ours_of[slots] if name in OUTPUTS else ours_of, whole, rtol=tolerance, atol=tolerance
        )
    for name, value in theirs.metrics().items():
        torch.testing.assert_close(output.metrics()[name], value, rtol=tolerance, atol=10 * tolerance, msg=name)
    copies = max(slots.count(row) for row in slots)
    for name, grad in grads.items():
        assert grad.dtype == dtype
        expected = their_grads[name].double()
        error = (grad.double() - expected).norm()
        assert error <= copies * (3 * ROUNDING[dtype] + tolerance) * (expected.norm() + 1e-2), name


def test_a_group_is_all_that_pairs_link() -> None:
    """Components come in the order of their first pairs, whatever the order of their sequences."""
    pairs = torch.tensor([[5, 1], [0, 3], [1, 2], [3, 0]])
    units = units_of(pairs, None, None, sequences=7, device=pairs.device, look=True)
    assert units.components() == ([[1, 2, 5], [0, 3], [4], [6]], [[0, 2], [1, 3], [], []])
    assert halves(6).components() == ([[0, 3], [1, 4], [2, 5]], [[0], [1], [2]])


class Storages(TorchDispatchMode):
    """Where the hidden states lie that the forward op gets."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.fastdpo.token_logps_forward.default:
            self.calls.append(args[0].untyped_storage().data_ptr())
        return func(*args, **(kwargs or {}))


def test_groups_whose_rows_lie_together_are_not_copied() -> None:
    """Packed sequences of which every position is scored: the op gets views of the caller's hidden states."""
    hidden, weight = torch.randn(12, 5), torch.randn(9, 5)
    targets, bounds = torch.randint(0, 9, (12,)), torch.tensor([0, 2, 5, 6, 8, 12])
    found = []
    for order, is_view in (([0, 1, 2, 3, 4], True), ([0, 3, 1, 2, 4], False)):
        pairs = torch.tensor(order)[torch.tensor([[0, 1], [2, 4], [3, 2]])]
        leaf = hidden.clone().requires_grad_()
        with groups_of(1), Storages() as storages:
            output = dpo_loss(leaf, weight, targets, cu_seqlens=bounds, pairs=pairs)
        assert is_grouped(output) and len(storages.calls) == 2
        assert all((place == leaf.untyped_storage().data_ptr()) == is_view for place in storages.calls)
        with groups_of(1 << 62):
            whole = dpo_loss(leaf, weight, targets, cu_seqlens=bounds, pairs=pairs)
        found = [torch.autograd.grad(x.loss, leaf)[0] for x in (output, whole)]
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


def test_gradients_of_what_is_picked_add_up_in_order() -> None:
    values = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([2, 0, 2, 2, 1])
    assert torch.autograd.gradcheck(lambda x: picked(x, index), values)
    assert torch.autograd.gradcheck(lambda x: picked(x[:, 0], index), values)
    (none,) = torch.autograd.grad(picked(values, index[:0]).sum(), values)
    assert not none.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LOSSES)
def test_extremes_leave_loss_and_gradients_finite(name: str, dtype: torch.dtype) -> None:
    """Certain and impossible completions in every pair of each other; weights from none to 1e30."""
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=dtype)
    logits = torch.tensor([2000.0, -2000.0, 40.0, -40.0, 0.0])
    hidden = torch.stack((logits, torch.zeros_like(logits)), dim=1).to(dtype).unsqueeze(1)
    pairs = torch.tensor([(i, j) for i in range(5) for j in range(5) if i != j])
    weights = torch.logspace(-30, 30, len(pairs)).where(torch.arange(len(pairs)) % 3 > 0, 0)
    options = {"loss_type": name} | ({"label_smoothing": 0.1} if name == "exo_pair" else {})
    for given_weights in (None, weights):
        for min_group in (1, 1 << 62):
            leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
            with groups_of(min_group):
                targets = torch.ones(5, 1, dtype=torch.int64)
                output = dpo_loss(*leaves, targets, pairs=pairs, weights=given_weights, outputs=OUTPUTS, **options)
            assert output.losses.isfinite().all() and all(value.isfinite() for value in output.metrics().values())
            grads = torch.autograd.grad(output.loss, leaves)
            if dtype == torch.float16:
                grads = [grad.nan_to_num(nan=float("nan"), posinf=0.0, neginf=0.0) for grad in grads]
            assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("options", [{"ld_alpha": 0.3}, {"use_weighting": True}, {"loss_type": "aot"}])
def test_compiled_as_one_graph(options: dict[str, Any]) -> None:
    batch = make_rows(11, 5, 9, 8, 50, torch.float32)
    units = {"pairs": torch.tensor([[0, 1], [0, 2], [4, 3]]), "weights": torch.tensor([1.0, 0.5, 2.0])}
    found = []
    for function in (dpo_loss, torch.compile(dpo_loss, fullgraph=True, backend="aot_eager")):
        rows, leaves = batch.with_leaves()
        arguments = {"ref_hidden": rows.ref_hidden, "ref_weight": rows.ref_weight}
        output = function(**rows.policy(), **arguments, **units, **options)
        found.append((output.loss.detach(), output.losses, output.metrics(), *torch.autograd.grad(output.loss, leaves)))
    torch.testing.assert_close(*found)


def test_under_func_grad() -> None:
    batch = make_rows(12, 4, 6, 5, 20, torch.float64)
    pairs = torch.tensor([[0, 1], [0, 2]])

    def loss(hidden: Tensor) -> Tensor:
        return dpo_loss(**replace(batch, hidden=hidden).policy(), pairs=pairs).loss

    leaf = batch.hidden.clone().requires_grad_()
    torch.testing.assert_close(torch.func.grad(loss)(batch.hidden), torch.autograd.grad(loss(leaf), leaf)[0])


# ------------------------------------------------------------------------------------------- rankings


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**31),
    sizes=st.lists(st.integers(2, 7), min_size=1, max_size=3),
    length=st.integers(1, 6),
    data=st.data(),
    options=st.sampled_from(
        [
            {},
            {"average_log_prob": True},
            {"f_divergence_type": "js_divergence"},
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        ]
    ),
    beta=st.sampled_from([0.05, 0.5]),
    grouped=st.booleans(),
    packed=st.booleans(),
)
def test_rankings_match_the_oracle(
    seed: int,
    sizes: list[int],
    length: int,
    data: st.DataObject,
    options: dict[str, Any],
    beta: float,
    grouped: bool,
    packed: bool,
) -> None:
    rows = sum(sizes) + 1  # one that is in no ranking
    order = data.draw(st.permutations(range(rows)))
    rankings = [order[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(sizes))]
    times = data.draw(st.lists(st.integers(0, 3), min_size=len(sizes), max_size=len(sizes)).filter(any))
    batch = make_rows(seed, rows, length, 6, 11, torch.float64)
    ours, leaves = batch.with_leaves()
    given_rows, layout = ours, {}
    if packed:
        given_rows, layout["cu_seqlens"] = ours.packed()
    filled = torch.tensor([ranking + [-1] * (max(sizes) - len(ranking)) for ranking in map(list, rankings)])
    with groups_of(1) if grouped else nullcontext():
        output = dpo_loss(
            **given_rows.policy(),
            ref_logps=batch.ref_logps().sum(1),
            rankings=filled,
            weights=torch.tensor(times, dtype=torch.float64),
            loss_type="plackett_luce",
            beta=beta,
            **layout,
            **options,
            workspace=batch.room_for(5),
        )
    assert is_grouped(output) == (grouped and len(sizes) + 1 > 1)
    grads = torch.autograd.grad(output.loss, leaves)

    wide, theirs = batch.with_leaves()
    tokens = wide.tokens()
    ranked = [completions(tokens, list(ranking), with_reference=True) for ranking in rankings]
    values = torch.stack(ranking_losses(ranked, beta=beta, **options))
    repeats = torch.tensor(times, dtype=torch.float64)
    loss = (values * repeats).sum() / repeats.sum()
    torch.testing.assert_close(output.losses, values.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(output.loss, loss, rtol=1e-12, atol=1e-12)
    for grad, truth in zip(grads, torch.autograd.grad(loss, theirs), strict=True):
        torch.testing.assert_close(grad, truth, rtol=1e-10, atol=1e-12)
    assert not grads[0][order[-1]].any()
    assert_agreement(output, tokens, rankings, beta, "average_log_prob" in options)


def assert_agreement(output: DPOOutput, tokens: Tokens, rankings: list[Any], beta: float, averaged: bool) -> None:
    ratios = (tokens.policy - tokens.reference).detach().sum(1)
    of = beta * (ratios / tokens.lengths if averaged else ratios)
    top, tau = [], []
    for ranking in rankings:
        values = of[list(ranking)].tolist()
        top.append(float(values[0] > max(values[1:])))
        signs = [math.copysign(1, a - b) for a, b in combinations(values, 2)]
        tau.append(sum(signs) / len(signs))
    assert output.top1.tolist() == top
    torch.testing.assert_close(output.kendall_tau, torch.tensor(tau, dtype=torch.float64))
    metrics = output.metrics()
    assert metrics["rewards/top1"] == sum(top) / len(top)
    assert metrics["rewards/kendall_tau"].item() == pytest.approx(sum(tau) / len(tau))
    best, worst = [ranking[0] for ranking in rankings], [ranking[-1] for ranking in rankings]
    torch.testing.assert_close(output.chosen_rewards, of[best])
    torch.testing.assert_close(output.rejected_rewards, of[worst])
    assert output.pairs.tolist() == [list(two) for two in zip(best, worst, strict=True)]


def test_a_ranking_of_two_is_a_pair() -> None:
    batch = make_rows(3, 6, 7, 8, 30, torch.float64)
    pairs = torch.tensor([[0, 4], [4, 2], [5, 1]])
    found = []
    for how in ({"pairs": pairs}, {"rankings": pairs, "loss_type": "plackett_luce"}):
        ours, leaves = batch.with_leaves()
        output = dpo_loss(**ours.policy(), ref_logps=batch.ref_logps().sum(1), **how)
        found.append((output.losses, output.loss.detach(), *torch.autograd.grad(output.loss, leaves)))
    torch.testing.assert_close(*found, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_rankings(dtype: torch.dtype) -> None:
    """Rewards that differ by thousands, either way: the loss is their difference, or next to 0 with all its digits."""
    weight = torch.tensor([[0.0], [1.0]], dtype=dtype)
    hidden = torch.tensor([[[0.0]], [[-2000.0]], [[-4000.0]], [[-50.0]]], dtype=dtype).requires_grad_()
    targets = torch.ones(4, 1, dtype=torch.int64)
    how = {"loss_type": "plackett_luce", "beta": 1.0}
    rankings = torch.tensor([[2, 1, 0], [0, 1, 2], [0, 3, -1]])
    output = dpo_loss(hidden, weight, targets, rankings=rankings, **how)
    log2 = math.log(2)  # the token of logit 0 has half of the probability
    expected = [6000 - log2 - log2, 0.0, math.log1p(math.exp(-50 + log2))]
    torch.testing.assert_close(output.losses, torch.tensor(expected, dtype=dtype), rtol=1e-6, atol=0)
    (grad,) = torch.autograd.grad(output.loss, hidden)
    assert grad.isfinite().all()


def test_equal_rewards_agree_with_no_ranking() -> None:
    rewards_of = torch.tensor([1.0, 1.0, 0.0])
    top1, tau = agreement(rewards_of, torch.tensor([[0, 1, 2], [0, 2, -1], [2, 1, 0]]))
    assert top1.tolist() == [0.0, 1.0, 0.0]
    torch.testing.assert_close(tau, torch.tensor([2 / 3, 1.0, -2 / 3], dtype=torch.float64))


def test_rankings_compile_as_one_graph() -> None:
    batch = make_rows(11, 5, 9, 8, 50, torch.float32)
    how = {"rankings": torch.tensor([[0, 1, 2], [4, 3, -1]]), "loss_type": "plackett_luce"}
    found = []
    for function in (dpo_loss, torch.compile(dpo_loss, fullgraph=True, backend="aot_eager")):
        rows, leaves = batch.with_leaves()
        output = function(**rows.policy(), **how)
        found.append((output.loss.detach(), output.losses, output.metrics(), *torch.autograd.grad(output.loss, leaves)))
    torch.testing.assert_close(*found)


def test_the_module_takes_them_as_well() -> None:
    batch = make_rows(1, 3, 5, 6, 20, torch.float32)
    pairs, weights = torch.tensor([[0, 1], [2, 1]], dtype=torch.int32), torch.tensor([1.0, 3.0])
    arguments = batch.policy()
    tensors = [arguments.pop(name) for name in ("hidden", "weight", "targets")]
    output = DPOLoss()(*tensors, **arguments, pairs=pairs, weights=weights)
    torch.testing.assert_close(output.loss, (output.losses * weights / 4).sum())
    assert output.entropy is None and output.top1 is None and "rewards/top1" not in output.metrics()
    of_oracle = rewards(
        *(completions(batch.double().tokens(), i, with_reference=False) for i in ([0, 2], [1, 1])),
        beta=0.1,
        loss_type="sigmoid",
    )
    torch.testing.assert_close(output.chosen_rewards.tolist(), [float(a) for a, _ in of_oracle], rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------- misuse

ROWS = make_rows(10, 3, 5, 8, 20, torch.float32)
POLICY = {name: getattr(ROWS, name) for name in ("hidden", "weight", "targets")}
PAIRS = torch.tensor([[0, 1], [2, 1]])
RANKED = {"loss_type": "plackett_luce"}
EMPTY = torch.where(torch.arange(3)[:, None] == 2, -100, ROWS.targets)
MISUSE = [
    ({"pairs": torch.tensor([[0, 1], [3, 1]])}, IndexError, "pairs[1] names sequence 3; there are 3, numbered from 0"),
    ({"pairs": torch.tensor([[0, -1]])}, IndexError, "pairs[0] names sequence -1; there are 3"),
    ({"pairs": torch.tensor([[0, 1], [2, 2]])}, ValueError, "pairs[1] names sequence 2 as chosen and as rejected"),
    ({"pairs": PAIRS[:0]}, ValueError, "pairs has shape (0, 2): there is no loss of no pairs"),
    ({"pairs": PAIRS[0]}, ValueError, "pairs has shape (2,); it should be [P, 2]"),
    ({"pairs": PAIRS.float()}, TypeError, "pairs has dtype torch.float32; it should be torch.int64"),
    ({"pairs": PAIRS.to("meta")}, ValueError, "pairs is on meta, targets on cpu"),
    ({"pairs": PAIRS.tolist()}, TypeError, "pairs is a list; it should be a torch.Tensor"),
    ({"pairs": PAIRS, "weights": torch.ones(3)}, ValueError, "weights has shape (3,); it should be (2,), one for each"),
    ({"pairs": PAIRS, "weights": torch.ones(2).long()}, TypeError, "weights has dtype torch.int64"),
    ({"pairs": PAIRS, "weights": torch.tensor([1.0, -0.5])}, ValueError, "weights[1] is -0.5; it should be at least 0"),
    ({"pairs": PAIRS, "weights": torch.tensor([float("nan"), 1.0])}, ValueError, "weights[0] is nan; it should be"),
    ({"pairs": PAIRS, "weights": torch.tensor([float("inf"), 1.0])}, ValueError, "weights[0] is inf; it should be"),
    ({"pairs": PAIRS, "weights": torch.zeros(2)}, ValueError, "weights are all 0"),
    (
        {"pairs": PAIRS, "weights": torch.tensor([1, 1e308], dtype=torch.float64)},
        ValueError,
        "weights[1] is 1e+308; it should be 0, or from 1e-37 to 1e+37",
    ),
    ({"pairs": PAIRS, "weights": torch.tensor([5e-324, 1], dtype=torch.float64)}, ValueError, "weights[0] is 5e-324"),
    ({"pairs": PAIRS, "targets": EMPTY}, ValueError, "every position is ignore_index (-100): sequence 2;"),
    ({"pairs": PAIRS, "cu_seqlens": torch.tensor([0])}, ValueError, "targets has shape (3, 5); with cu_seqlens"),
    ({"pairs": PAIRS, "ref_logps": torch.zeros(4)}, ValueError, "ref_logps has shape (4,); it should be (3,)"),
    ({"pairs": PAIRS, **RANKED}, ValueError, "loss_type 'plackett_luce' is a loss of rankings: give rankings, [R, K]"),
    ({**RANKED}, ValueError, "loss_type 'plackett_luce' is a loss of rankings: give rankings"),
    ({"rankings": PAIRS}, ValueError, "rankings is given, but loss_type 'sigmoid' is a loss of pairs"),
    ({"rankings": PAIRS[:, :1], **RANKED}, ValueError, "rankings has shape (2, 1); it should be [R, K], K at least 2"),
    (
        {"rankings": torch.tensor([[0, -1], [0, 1]]), **RANKED},
        ValueError,
        "rankings[0] has 1 sequences; it should have",
    ),
    ({"rankings": torch.tensor([[0, 1, 0]]), **RANKED}, ValueError, "rankings[0] is [0, 1, 0]; it should name each"),
    (
        {"rankings": torch.tensor([[0, -1, 1]]), **RANKED},
        ValueError,
        "rankings[0] is [0, -1, 1]; -1 should stand behind",
    ),
    ({"rankings": torch.tensor([[0, 3]]), **RANKED}, IndexError, "rankings[0] names sequence 3; there are 3"),
    ({"rankings": PAIRS, **RANKED, "ld_alpha": 0.5}, ValueError, "'plackett_luce' does not define ld_alpha"),
    ({"rankings": PAIRS, "loss_type": ["plackett_luce", "sft"]}, ValueError, "which does not mix with losses of pairs"),
    ({}, ValueError, "targets has shape (3, 5); it should be [2B, T], an even number of rows"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), MISUSE)
def test_misuse(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        dpo_loss(**{**POLICY, **arguments})


def test_a_completion_of_nothing_may_stand_in_no_pair() -> None:
    output = dpo_loss(**{**POLICY, "targets": EMPTY}, pairs=torch.tensor([[0, 1]]), outputs=OUTPUTS)
    assert output.loss.isfinite() and output.entropy[2] == 0
