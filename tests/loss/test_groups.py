"""dpo_loss in groups of pairs: against the primitive and float64, what it costs, and what autograd may do with it."""

from __future__ import annotations

import textwrap
import warnings
from typing import Any

import processes
import pytest
import torch
import torch.nn.functional as F
from grouped_losses import INPUTS, SMALL, WHOLE, Batch, assert_same, groups_of, is_grouped, make_batch, run
from hypothesis import given
from hypothesis import strategies as st
from oracle import relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastdpo import DPOOutput, dpo_loss
from fastdpo.logps import oracle as reference
from fastdpo.loss import group_plan
from fastdpo.loss.oracle import losses_of_sequences

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def float64_grads(batch: Batch, factor: float = 1.0, beta: float = 0.1) -> dict[str, Tensor]:
    inputs = [x.double().requires_grad_() for x in (batch.hidden, batch.weight, batch.bias)]
    logps = reference.token_logps(*inputs[:2], batch.targets, inputs[2], **batch.options).logps.sum(1)
    loss = losses_of_sequences(logps, batch.ref_logps.double(), beta=beta).mean()
    return dict(zip(INPUTS, torch.autograd.grad(factor * loss, inputs), strict=True))


# ------------------------------------------------------------------------------------------- the same results


@given(
    seed=st.integers(0, 2**31),
    pairs=st.integers(2, 6),
    length=st.integers(1, 14),
    h=st.integers(2, 20),
    v=st.sampled_from([2, 31, 300]),
    dtype=st.sampled_from(DTYPES),
    rows=st.sampled_from([0, 1, 5, 20, 1000]),
    needs=st.sampled_from(
        [INPUTS, ("hidden",), ("weight",), ("bias",), ("hidden", "weight"), ("hidden", "bias"), ("weight", "bias")]
    ),
    min_group=st.sampled_from([1, 10]),
    factor=st.sampled_from([1.0, 1 / 3, -4.0]),
    packed=st.booleans(),
    loss=st.sampled_from(
        [
            {},
            {"label_smoothing": 0.2},
            {"loss_type": "ipo"},
            {"loss_type": "ipo", "ipo_reduction": "sum"},
            {"loss_type": "hinge", "beta": 0.3},
            {"loss_type": ["apo_zero", "sft"], "loss_weights": [1.0, 0.3], "sft_reduction": "batch"},
            {"ld_alpha": 0.3, "ld_reference": "policy", "sft_weight": 0.5},
            {"use_weighting": True, "outputs": ("entropy", "mean_logits", "is_top1")},
        ]
    ),
    model=st.sampled_from([{}, {"softcap": 5.0, "logit_scale": 0.5, "temperature": 0.7}]),
)
def test_groups_are_the_primitive(
    seed: int,
    pairs: int,
    length: int,
    h: int,
    v: int,
    dtype: torch.dtype,
    rows: int,
    needs: tuple[str, ...],
    min_group: int,
    factor: float,
    packed: bool,
    loss: dict[str, Any],
    model: dict[str, Any],
) -> None:
    batch = make_batch(seed, pairs, length, h, v, dtype, **model)
    same = {"needs": needs, "factor": factor, "packed": packed, **loss}
    ours = run(batch, min_group=min_group, workspace=batch.room_for(rows), **same)
    assert_same(ours, run(batch, min_group=WHOLE, **same), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("needs", [INPUTS, ("hidden",), ("weight", "bias")])
def test_any_division_is_the_same(dtype: torch.dtype, needs: tuple[str, ...]) -> None:
    batch = make_batch(0, 10, 30, 12, 200, dtype)
    whole = run(batch, min_group=WHOLE, workspace=1 << 30, needs=needs)
    assert not is_grouped(whole[0]) and batch.tokens.sum() > 200
    for min_group, rows in ((1, 8), (1, 40), (30, 8), (30, 60), (80, 100)):
        ours = run(batch, min_group=min_group, workspace=batch.room_for(rows), needs=needs)
        assert is_grouped(ours[0])
        assert_same(ours, whole, dtype)


@pytest.mark.parametrize("layout", ["slice", "transposed"])
def test_hidden_need_not_be_contiguous(layout: str) -> None:
    batch = make_batch(1, 4, 9, 12, 50, torch.float32)
    expected, grads = run(batch, min_group=SMALL, needs=("hidden",))
    if layout == "slice":  # as in hidden_states[:, :-1]
        base = F.pad(batch.hidden, (0, 0, 0, 1)).requires_grad_()
        hidden = base[:, :-1]
    else:
        base = batch.hidden.transpose(0, 1).contiguous().requires_grad_()
        hidden = base.transpose(0, 1)
    with groups_of(SMALL):
        output = dpo_loss(hidden, batch.weight, batch.targets, bias=batch.bias, ref_logps=batch.ref_logps)
    assert is_grouped(output) and torch.equal(output.loss, expected.loss)
    (grad,) = torch.autograd.grad(output.loss, base)
    grad = grad[:, :-1] if layout == "slice" else grad.transpose(0, 1)
    assert torch.equal(grad, grads["hidden"])


def test_reference_hidden_states() -> None:
    batch = make_batch(2, 4, 9, 12, 50, torch.float32)
    outputs = []
    for min_group in (SMALL, WHOLE):
        weight = batch.weight.clone().requires_grad_()
        with groups_of(min_group):
            output = dpo_loss(
                batch.hidden, weight, batch.targets, ref_hidden=batch.hidden.flip(0), workspace=batch.room_for(20)
            )
        outputs.append((output, {"weight": torch.autograd.grad(output.loss, weight)[0]}))
    assert is_grouped(outputs[0][0])
    assert_same(*outputs, torch.float32)


# ------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("factor", [1.0, 1 / 3])
def test_a_bfloat16_gradient_is_rounded_once(factor: float) -> None:
    """Sixteen groups are as near to float64 as one, and their sum is off by no more than the rounding to bfloat16."""
    batch = make_batch(3, 16, 40, 64, 400, torch.bfloat16)
    truth = float64_grads(batch, factor)
    whole, of_whole = run(batch, min_group=WHOLE, workspace=1 << 30, factor=factor)
    output, grads = run(batch, min_group=SMALL, workspace=batch.room_for(80), factor=factor)
    assert is_grouped(output) and not is_grouped(whole)
    for name in ("weight", "bias"):
        error = relative_error(grads[name], truth[name])
        assert error <= 1.05 * relative_error(of_whole[name], truth[name])
        # Rounding errs by up to 2^-8 of a number, and by less than 2^-9 in the mean square.
        assert error <= 2**-9
    assert relative_error(grads["hidden"], truth["hidden"]) <= (2**-9 if factor == 1 else 2**-8)


def test_small_float16_gradients_outlive_the_forward() -> None:
    """With a loss scale, as GradScaler multiplies by: without it, hidden's gradients are below float16's range."""
    batch = make_batch(4, 4, 12, 16, 50, torch.float16)
    scale, beta = 2.0**24, 1e-5
    output, grads = run(batch, min_group=SMALL, needs=("hidden",), factor=scale, beta=beta)
    truth = float64_grads(batch, scale, beta)["hidden"]
    assert is_grouped(output) and (truth.abs().max() / scale) < 2**-18
    assert relative_error(grads["hidden"], truth) <= 2**-10


def test_under_autocast_a_float32_weight_has_a_float32_sum() -> None:
    """The gradient is not rounded to autocast's dtype, and its sum takes no memory beside it."""
    batch = make_batch(5, 6, 20, 16, 100, torch.float32)
    narrow = Batch(*(x.bfloat16() for x in (batch.hidden, batch.weight)), batch.bias, batch.targets, batch.ref_logps)
    truth = float64_grads(narrow)
    with torch.autocast("cpu", torch.bfloat16):
        # Room for the exponentials alone.
        output, grads = run(batch, min_group=SMALL, workspace=60 * 100 * 2)
        assert is_grouped(output)
        _, of_whole = run(batch, min_group=WHOLE, workspace=1 << 30)
    for name in INPUTS:
        assert relative_error(grads[name], truth[name]) <= 1.05 * relative_error(of_whole[name], truth[name])
    # What is left is the rounding of the exponentials that were kept, 8 bits of each, which evens out in the sum.
    assert relative_error(grads["weight"], truth["weight"]) < 0.5 * relative_error(of_whole["weight"], truth["weight"])


def test_gradcheck() -> None:
    batch = make_batch(6, 2, 3, 3, 7, torch.float64)
    inputs = [x.requires_grad_() for x in (batch.hidden, batch.weight, batch.bias)]

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        output = dpo_loss(
            hidden, weight, batch.targets, bias=bias, ref_logps=batch.ref_logps, workspace=batch.room_for(3)
        )
        assert is_grouped(output)
        return output.loss

    with groups_of(SMALL):
        assert torch.autograd.gradcheck(loss, inputs)


# ------------------------------------------------------------------------------------------- what it costs


class OpCalls(TorchDispatchMode):
    """The calls of fastdpo's ops: (op, tokens, rows retained, whether the direction was asked for)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int, int, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.fastdpo.token_logps_forward.default:
            self.calls.append(("forward", len(args[2]), len(result[3]), kwargs["need_direction"]))
        elif func is torch.ops.fastdpo.token_logps_backward.default:
            self.calls.append(("backward", len(args[3]), len(args[7]), kwargs["need_hidden"]))
        return result


def calls_of(batch: Batch, **how: Any) -> list[tuple[str, int, int, bool]]:
    with OpCalls() as ops:
        run(batch, **how)
    return ops.calls


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ops_do_what_was_planned(dtype: torch.dtype) -> None:
    batch = make_batch(7, 8, 20, 12, 200, dtype)
    chosen, rejected = batch.tokens.chunk(2)
    tokens, rows = (chosen + rejected).tolist(), 30
    room = {"row_bytes": batch.row_bytes(), "sum_bytes": batch.sum_bytes(), "workspace": batch.room_for(rows)}
    with groups_of(SMALL):
        plan = group_plan.plan_groups(tokens, **room)
    assert len(plan.groups) > 2 and plan.kept == rows
    expected = []
    for first, last in plan.groups:
        size = sum(tokens[first:last])
        expected += [("forward", size, min(size, rows), True), ("backward", size, min(size, rows), False)]
    calls = calls_of(batch, min_group=SMALL, workspace=room["workspace"])
    assert calls == expected
    # In the backward of the loss nothing is left to compute.
    assert sum(size - kept for op, size, kept, _ in calls if op == "forward") == plan.recomputed


def test_frozen_head_calls_no_backward_op() -> None:
    batch = make_batch(8, 8, 20, 12, 200, torch.bfloat16)
    calls = calls_of(batch, min_group=30, needs=("hidden",))
    assert len(calls) > 2
    assert all(op == "forward" and kept == 0 and direction for op, _, kept, direction in calls)
    assert sum(size for _, size, *_ in calls) == int(batch.tokens.sum())


def test_what_needs_no_gradient_costs_nothing() -> None:
    batch = make_batch(9, 8, 20, 12, 200, torch.float32)
    workspace = batch.room_for(20)
    whole = [("forward", batch.targets.numel(), 0, False)]
    assert calls_of(batch, min_group=SMALL, workspace=workspace, needs=()) == whole
    weight = batch.weight.requires_grad_()
    with torch.no_grad(), groups_of(SMALL), OpCalls() as ops:
        output = dpo_loss(batch.hidden, weight, batch.targets, workspace=workspace)
    assert ops.calls == whole and not output.loss.requires_grad
    # A frozen hidden needs no direction.
    calls = calls_of(batch, min_group=SMALL, workspace=workspace, needs=("weight",))
    assert len(calls) > 2 and not any(direction for *_, direction in calls)


def test_a_batch_that_fits_is_not_divided() -> None:
    """One group is the primitive: its gradient is not computed before it is asked for."""
    batch = make_batch(10, 8, 20, 12, 200, torch.float32)
    total = int(batch.tokens.sum())
    calls = calls_of(batch, min_group=SMALL, workspace=batch.row_bytes() * total)
    assert calls == [
        ("forward", batch.targets.numel(), total, True),
        ("backward", batch.targets.numel(), total, True),
    ]
    output, _ = run(batch, min_group=group_plan.MIN_GROUP_TOKENS, workspace=batch.room_for(10))
    assert not is_grouped(output)


MEMORY_SCRIPT = """
    import sys, torch, fastdpo
    frozen, workspace, dtype = sys.argv[1] == "frozen", int(sys.argv[2]), getattr(torch, sys.argv[3])
    pairs, t, h, v = 12, 256, 128, 16_000

    def status(name):
        return int(next(l for l in open("/proc/self/status") if l.startswith(name)).split()[1]) * 1024

    def inputs(pairs, v):
        hidden = torch.randn(2 * pairs, t, h).to(dtype).requires_grad_()
        weight = (torch.randn(v, h) / h**0.5).to(dtype).requires_grad_(not frozen)
        return hidden, weight, torch.randint(0, v, (2 * pairs, t))

    def step(hidden, weight, targets):
        fastdpo.dpo_loss(hidden, weight, targets, workspace=workspace).loss.backward()

    step(*inputs(8, 64))
    tensors = inputs(pairs, v)
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")
    step(*tensors)
    print(status("VmHWM") - before - sum(x.grad.nbytes for x in tensors[:2] if x.grad is not None))
"""


@pytest.mark.parametrize(("head", "dtype"), [("frozen", "bfloat16"), ("trains", "float32"), ("trains", "bfloat16")])
def test_memory(head: str, dtype: str) -> None:
    """Peak resident memory beyond inputs and gradients: the workspace, the ops' own, and one group's rows.

    All exponentials of the batch would be 200 MB in bfloat16, 400 MB in float32.
    """
    tokens, group, h, v = 12 * 512, 1024 if head == "trains" else 2560, 128, 16_000
    operand = 2 if dtype == "bfloat16" else 4
    workspace = group * v * operand + (4 * v * h if operand == 2 else 0)
    # Blocks of a megabyte and more go back to the system when they are freed.
    freed = {"MALLOC_MMAP_THRESHOLD_": "1000000"}
    result = processes.run(textwrap.dedent(MEMORY_SCRIPT), head, str(workspace), dtype, **freed)
    assert result.returncode == 0, result.stderr
    of_group = group * h * (operand + 4 + 4)
    assert int(result.stdout) <= 64e6 + (workspace if head == "trains" else 0) + of_group + 64 * tokens


# ------------------------------------------------------------------------------------------- autograd


def grouped(batch: Batch, *needs: str) -> tuple[DPOOutput, dict[str, Tensor]]:
    """The output, and the leaves that train; there are groups."""
    leaves = {name: getattr(batch, name).detach().clone().requires_grad_(name in needs) for name in INPUTS}
    with groups_of(SMALL):
        output = dpo_loss(
            **leaves, targets=batch.targets, ref_logps=batch.ref_logps, workspace=batch.room_for(20), **batch.options
        )
    assert is_grouped(output)
    return output, {name: leaf for name, leaf in leaves.items() if name in needs}


BATCH = make_batch(11, 8, 20, 8, 60, torch.float32)


def test_with_another_term_in_the_loss() -> None:
    output, leaves = grouped(BATCH, *INPUTS)
    others = sum((i + 1) * leaf.square().sum() for i, leaf in enumerate(leaves.values()))
    (2 * output.loss + others).backward()
    _, expected = run(BATCH, min_group=WHOLE, factor=2.0)
    for i, (name, leaf) in enumerate(leaves.items()):
        torch.testing.assert_close(leaf.grad, expected[name] + 2 * (i + 1) * leaf.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_backward_three_times(dtype: torch.dtype, factor: float) -> None:
    batch = make_batch(12, 8, 20, 8, 60, dtype)
    _, expected = run(batch, min_group=SMALL, workspace=batch.room_for(20), factor=factor)
    output, leaves = grouped(batch, *INPUTS)
    for times in (1, 2, 3):
        (factor * output.loss).backward(retain_graph=times < 3)
        for name, leaf in leaves.items():
            torch.testing.assert_close(leaf.grad.double(), times * expected[name].double(), rtol=2**-6, atol=1e-6)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        output.loss.backward()


def test_a_gradient_changed_in_place_does_not_change_the_next() -> None:
    output, leaves = grouped(BATCH, *INPUTS)
    first = torch.autograd.grad(output.loss, leaves.values(), retain_graph=True)
    copies = [grad.clone() for grad in first]
    for grad in first:
        grad.zero_()
    second = torch.autograd.grad(output.loss, leaves.values(), retain_graph=True)
    third = torch.autograd.grad(output.loss, leaves.values())
    for grads in (second, third):
        assert all(torch.equal(a, b) for a, b in zip(grads, copies, strict=True))


def test_gradients_are_given_away_where_nothing_multiplies_them() -> None:
    """A float32 weight's gradient on the CPU is the sum itself, not a copy of it."""
    output, leaves = grouped(BATCH, *INPUTS)
    saved = [x.data_ptr() for x in output.loss.grad_fn.saved_tensors]
    output.loss.backward()
    assert [leaf.grad.data_ptr() for leaf in leaves.values()] == saved


def test_second_derivative_is_refused() -> None:
    output, leaves = grouped(BATCH, "hidden")
    (grad,) = torch.autograd.grad(output.loss.square(), leaves["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_inputs_may_change_after_the_forward() -> None:
    """The gradients are there already."""
    _, expected = run(BATCH, min_group=SMALL, workspace=BATCH.room_for(20), needs=("hidden",))
    output, leaves = grouped(BATCH, "hidden")
    with torch.no_grad():
        leaves["hidden"].zero_()
    output.loss.backward()
    assert torch.equal(leaves["hidden"].grad, expected["hidden"])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_under_checkpointing(use_reentrant: bool) -> None:
    _, expected = run(BATCH, min_group=SMALL, workspace=BATCH.room_for(20), needs=("hidden",))
    hidden = BATCH.hidden.clone().requires_grad_()

    def loss(hidden: Tensor) -> Tensor:
        options = {"ref_logps": BATCH.ref_logps, "workspace": BATCH.room_for(20)}
        return dpo_loss(hidden, BATCH.weight, BATCH.targets, bias=BATCH.bias, **options).loss

    with groups_of(SMALL):
        checkpoint(loss, hidden, use_reentrant=use_reentrant).backward()
    assert torch.equal(hidden.grad, expected["hidden"])


def test_with_saved_tensors_elsewhere() -> None:
    _, expected = run(BATCH, min_group=SMALL, workspace=BATCH.room_for(20))
    with torch.autograd.graph.save_on_cpu():
        output, leaves = grouped(BATCH, *INPUTS)
    for times in (1, 2, 3):
        output.loss.backward(retain_graph=True)
        for name, leaf in leaves.items():
            torch.testing.assert_close(leaf.grad, times * expected[name])


def test_compiled_as_one_graph() -> None:
    """There the whole batch is taken at once."""
    _, expected = run(BATCH, min_group=SMALL, workspace=BATCH.room_for(20))
    leaves = [getattr(BATCH, name).clone().requires_grad_() for name in INPUTS]
    with groups_of(SMALL):
        output = torch.compile(dpo_loss, fullgraph=True, backend="aot_eager")(
            leaves[0],
            leaves[1],
            BATCH.targets,
            bias=leaves[2],
            ref_logps=BATCH.ref_logps,
            workspace=BATCH.room_for(20),
        )
    output.loss.backward()
    for name, leaf in zip(INPUTS, leaves, strict=True):
        torch.testing.assert_close(leaf.grad, expected[name])


def test_no_warnings() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in DTYPES:
            for packed in (False, True):
                batch = make_batch(13, 8, 20, 8, 50, dtype)
                assert is_grouped(run(batch, min_group=SMALL, workspace=batch.room_for(20), packed=packed)[0])


# ------------------------------------------------------------------------------------------- misuse


@pytest.mark.parametrize("target", [60, -1])
def test_a_target_outside_the_vocabulary_is_named_by_its_position_in_the_batch(target: int) -> None:
    batch = make_batch(14, 6, 12, 8, 60, torch.float32)
    scored = (batch.targets.view(-1) != -100).nonzero().squeeze(1)
    position = int(scored[len(scored) // 2])
    batch.targets.view(-1)[position] = target
    with (
        groups_of(SMALL),
        pytest.raises(IndexError, match=rf"targets\[{position}\] is {target}; it should be in \[0, 60"),
    ):
        dpo_loss(batch.hidden.requires_grad_(), batch.weight, batch.targets, ref_logps=batch.ref_logps)
