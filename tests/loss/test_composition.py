"""What PyTorch users combine: autocast, compile, torch.func, checkpointing, accumulation, fake tensors, copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from grouped_losses import SMALL, WHOLE, groups_of
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import LOSSES
from tiny_models import make_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from fastdpo import DPOLoss, dpo_loss, token_logps
from fastdpo.logps import oracle as reference
from fastdpo.model.head import FusedHead

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS, LENGTH, H, V = 3, 7, 8, 40
GENERATOR = torch.Generator().manual_seed(0)
HIDDEN = torch.randn(2 * PAIRS, LENGTH, H, generator=GENERATOR)
WEIGHT = torch.randn(V, H, generator=GENERATOR)
BIAS = torch.randn(V, generator=GENERATOR)
TARGETS = torch.randint(0, V, (2 * PAIRS, LENGTH), generator=GENERATOR)
TARGETS[:, :2] = -100
REF_LOGPS = -20 + torch.randn(2 * PAIRS, generator=GENERATOR)
BOUNDS = torch.arange(0, 2 * PAIRS + 1) * LENGTH
INPUTS = (HIDDEN, WEIGHT, BIAS)
# For a float32 sum of the weight's gradients, and the exponentials of a pair.
ROOM = 4 * WEIGHT.numel() + 10 * 4 * V


def of_tokens(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A scalar that is not linear in the log-probabilities."""
    return token_logps(hidden, weight, TARGETS, bias).logps.square().sum()


def linear_in_tokens(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return token_logps(hidden, weight, TARGETS, bias).logps.sum()


def of_pairs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return dpo_loss(hidden, weight, TARGETS, bias=bias, ref_logps=REF_LOGPS).loss


def of_packed_pairs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return dpo_loss(
        hidden.reshape(-1, H), weight, TARGETS.view(-1), bias=bias, ref_logps=REF_LOGPS, cu_seqlens=BOUNDS
    ).loss


def of_pairs_in_groups(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    with groups_of(SMALL):
        return dpo_loss(hidden, weight, TARGETS, bias=bias, ref_logps=REF_LOGPS, workspace=ROOM).loss


def test_groups_come_about() -> None:
    for needs in ((1, 1, 1), (1, 0, 0), (0, 1, 1)):
        inputs = [x.clone().requires_grad_(bool(need)) for x, need in zip(INPUTS, needs, strict=True)]
        assert "GroupedLoss" in of_pairs_in_groups(*inputs).grad_fn.name()


ENTRIES = [of_tokens, linear_in_tokens, of_pairs, of_packed_pairs, of_pairs_in_groups]


def value_and_grads(
    entry: Callable[..., Tensor], *inputs: Tensor, needs: tuple[int, ...] = (1, 1, 1)
) -> list[Tensor | None]:
    leaves = [x.detach().clone().requires_grad_(bool(need)) for x, need in zip(inputs, needs, strict=True)]
    value = entry(*leaves)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


@pytest.fixture(autouse=True)
def forget_compiled_graphs() -> Iterator[None]:
    yield
    torch._dynamo.reset()


# ---------------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_autocast(entry: Callable[..., Tensor], hidden_dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    """It is the inputs' rounding to bfloat16, gradients come in the leaves' dtypes, and backward may be anywhere."""
    inputs = (HIDDEN.to(hidden_dtype), WEIGHT.to(weight_dtype), BIAS)
    with torch.autocast("cpu", torch.bfloat16):
        inside = value_and_grads(entry, *inputs)
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = entry(*leaves)
    value.backward()
    outside = [value.detach(), *(leaf.grad for leaf in leaves)]
    rounded = value_and_grads(entry, HIDDEN.bfloat16(), WEIGHT.bfloat16(), BIAS)
    assert value.dtype == torch.float32
    for i, (a, b, expected) in enumerate(zip(inside, outside, rounded, strict=True)):
        assert torch.equal(a, b)
        assert i == 0 or a.dtype == inputs[i - 1].dtype
        # A float32 weight's gradient need not have been rounded on the way.
        torch.testing.assert_close(a, expected, check_dtype=False, rtol=2**-7 if i else 0, atol=2**-9 if i else 0)


@pytest.mark.parametrize("entry", ENTRIES)
def test_autocast_leaves_float64_as_it_is(entry: Callable[..., Tensor]) -> None:
    inputs = [x.double() for x in INPUTS]
    expected = value_and_grads(entry, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(value_and_grads(entry, *inputs), expected, strict=True))


@pytest.mark.parametrize("entry", [of_pairs, of_pairs_in_groups])
def test_float16_with_a_gradient_scaler(entry: Callable[..., Tensor]) -> None:
    leaves = [x.clone().requires_grad_() for x in INPUTS]
    expected = value_and_grads(entry, *(x.half().float() for x in INPUTS))[1:]
    optimizer = torch.optim.SGD(leaves, lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with torch.autocast("cpu", torch.float16):
        loss = entry(*leaves)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for leaf, grad in zip(leaves, expected, strict=True):
        assert (leaf.grad - grad).norm() <= 2**-8 * grad.norm()
    before = leaves[1].detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**10  # no overflow was found
    assert torch.equal(leaves[1].detach(), before - leaves[1].grad)


# ----------------------------------------------------------------------------------------------------------- compile


def assert_compiles(
    entry: Callable[..., Tensor], needs: tuple[int, ...] = (1, 1, 1), backend: str = "aot_eager"
) -> None:
    expected = value_and_grads(entry, *INPUTS, needs=needs)
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    compiled = torch.compile(entry, fullgraph=True, backend=counter)
    for _ in range(2):
        for a, b in zip(value_and_grads(compiled, *INPUTS, needs=needs), expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


@pytest.mark.parametrize("entry", [of_tokens, of_pairs, of_packed_pairs])
@pytest.mark.parametrize("needs", [(1, 1, 1), (1, 0, 0)])
def test_compiled_as_one_graph(entry: Callable[..., Tensor], needs: tuple[int, ...]) -> None:
    assert_compiles(entry, needs)


def test_compiled_with_a_reference_model() -> None:
    reference_model = {"ref_hidden": HIDDEN.flip(0), "ref_weight": WEIGHT.flip(0), "ref_bias": BIAS.flip(0)}
    assert_compiles(lambda h, w, b: dpo_loss(h, w, TARGETS, bias=b, **reference_model).loss)


def test_compiled_module() -> None:
    module = DPOLoss(loss_type="ipo", softcap=5.0)
    assert_compiles(lambda h, w, b: module(h, w, TARGETS, bias=b, ref_hidden=HIDDEN.flip(0)).loss)


def test_compiled_under_autocast() -> None:
    def entry(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return of_pairs(hidden, weight, bias)

    assert_compiles(entry)


def tokens_of_any_length(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return token_logps(hidden, weight, targets).logps.square().sum()


def pairs_of_any_length(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return dpo_loss(hidden.unflatten(0, (2, -1)), weight, targets.unflatten(0, (2, -1))).loss


@pytest.mark.parametrize("entry", [tokens_of_any_length, pairs_of_any_length])
def test_compiled_once_for_any_number_of_tokens(entry: Callable[..., Tensor]) -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(entry, fullgraph=True, backend=counter)
    for n in (6, 20, 42, 64):
        hidden, targets = torch.randn(n, H, requires_grad=True), torch.randint(0, V, (n,))
        for tensor in (hidden, targets):
            torch._dynamo.mark_dynamic(tensor, 0)
        weight = WEIGHT.clone().requires_grad_()
        results = []
        for function in (compiled, entry):
            value = function(hidden, weight, targets)
            results.append((value.detach(), *torch.autograd.grad(value, [hidden, weight])))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


class TinyModel(nn.Module):
    """A model with its loss inside, and tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(V, H)
        self.body = nn.Sequential(nn.Linear(H, H), nn.Tanh())
        self.head = nn.Linear(H, V)
        self.head.weight = self.embedding.weight
        self.loss = DPOLoss(beta=0.5)

    def hidden(self, ids: Tensor) -> Tensor:
        return self.body(self.embedding(ids))

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        hidden = self.hidden(ids)
        return self.loss(
            hidden, self.head.weight, targets, bias=self.head.bias, ref_hidden=hidden.detach().flip(0)
        ).loss


IDS = torch.randint(0, V, TARGETS.shape, generator=GENERATOR)


def test_training_a_compiled_model() -> None:
    results = []
    for compiled in (False, True):
        model = TinyModel()
        run = torch.compile(model, fullgraph=True) if compiled else model
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = run(IDS, TARGETS)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        results.append([*losses, *model.parameters()])
    assert results[0][0] > results[0][2]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # Adam divides by gradients' roots


def test_the_head_of_a_compiled_model() -> None:
    model = make_model("gpt2")
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": TARGETS}
    head = FusedHead(model)
    expected = head(model, **batch).logps
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = head(compiled, **batch).logps
    torch.testing.assert_close(got, expected)
    weights = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), weights) for x in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)


# What is added up in other ways, compiled as well: pairs sorted, sequences divided, tokens' outputs summed.
OTHER_SUMS = [{"loss_type": "aot"}, {"ld_alpha": 0.5}, {"use_weighting": True, "outputs": ("entropy", "is_top1")}]


def of_options(options: dict[str, Any], *, packed: bool = False) -> Callable[..., Tensor]:
    """The loss with these options; the reference, if the loss takes one, is the hidden states in another order."""

    def entry(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        layout = {"targets": TARGETS.flatten(), "cu_seqlens": BOUNDS} if packed else {"targets": TARGETS}
        hidden = hidden.reshape(*layout["targets"].shape, H)
        alone = options.get("loss_type") in ("sft", "simpo", "orpo", "cpo")
        ref = {} if alone else {"ref_hidden": hidden.detach().flip(0)}
        return dpo_loss(hidden, weight, bias=bias, **layout, **ref, **options).loss

    return entry


@pytest.mark.parametrize("options", OTHER_SUMS, ids=str)
def test_compiled_with_other_sums(options: dict[str, Any]) -> None:
    assert_compiles(of_options(options, packed=True))


# -------------------------------------------------------------------------------------------------------- torch.func


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("packed", [False, True])
def test_func_grad_and_meta_tensors_with_every_loss(
    loss_type: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = of_options(
        {"loss_type": loss_type} | ({"label_smoothing": 1e-3} if loss_type == "exo_pair" else {}), packed=packed
    )
    grads = value_and_grads(entry, *INPUTS)[1:]
    for got, grad in zip(torch.func.grad(entry, argnums=(0, 1, 2))(*INPUTS), grads, strict=True):
        torch.testing.assert_close(got, grad)
    for name in ("TARGETS", "BOUNDS"):
        monkeypatch.setitem(globals(), name, globals()[name].to("meta"))
    shapes = value_and_grads(entry, *(x.to("meta") for x in INPUTS))[1:]
    assert [shape.shape for shape in shapes] == [x.shape for x in INPUTS]


@pytest.mark.parametrize("entry", ENTRIES)
def test_func_grad(entry: Callable[..., Tensor]) -> None:
    value, *grads = value_and_grads(entry, *INPUTS)
    got, same_value = torch.func.grad_and_value(entry, argnums=(0, 1, 2))(*INPUTS)
    torch.testing.assert_close(same_value, value)
    for a, b in zip(got, grads, strict=True):
        torch.testing.assert_close(a, b)
    (hidden_alone,) = torch.func.vjp(lambda h: entry(h, WEIGHT, BIAS), HIDDEN)[1](torch.ones(()))
    torch.testing.assert_close(hidden_alone, grads[0])


def test_func_grad_with_all_tensors_as_arguments() -> None:
    def loss(weight: Tensor, hidden: Tensor, targets: Tensor, ref_hidden: Tensor, cu_seqlens: Tensor) -> Tensor:
        return dpo_loss(hidden, weight, targets, ref_hidden=ref_hidden, cu_seqlens=cu_seqlens).loss

    arguments = (WEIGHT.clone().requires_grad_(), HIDDEN.view(-1, H), TARGETS.view(-1), HIDDEN.flip(0).view(-1, H))
    (expected,) = torch.autograd.grad(loss(*arguments, BOUNDS), arguments[0])
    torch.testing.assert_close(torch.func.grad(loss)(arguments[0].detach(), *arguments[1:], BOUNDS), expected)


def test_functional_call() -> None:
    model = TinyModel()
    model(IDS, TARGETS).backward()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    grads = torch.func.grad(lambda p: torch.func.functional_call(model, p, (IDS, TARGETS)))(parameters)
    assert grads.keys() == parameters.keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad)


NO_FORWARD_MODE = "no forward-mode derivatives .*: use reverse mode, such as backward, torch.func.grad"
NO_VMAP = "cannot be vmapped. token_logps need not be: .* any leading dimensions at once; .* loop over them"
NO_SECOND = "cannot differentiate twice: .* fastdpo.logps.oracle computes the same from full logits"


def dual(entry: Callable[..., Tensor]) -> Tensor:
    with torch.autograd.forward_ad.dual_level():
        return entry(torch.autograd.forward_ad.make_dual(HIDDEN, HIDDEN), WEIGHT, BIAS)


@pytest.mark.parametrize("entry", ENTRIES)
def test_forward_mode_is_refused(entry: Callable[..., Tensor]) -> None:
    def of_hidden(hidden: Tensor) -> Tensor:
        return entry(hidden, WEIGHT, BIAS)

    for attempt in (
        lambda: torch.func.jvp(of_hidden, (HIDDEN,), (HIDDEN,)),
        lambda: torch.func.jacfwd(of_hidden)(HIDDEN),
        lambda: torch.func.hessian(of_hidden)(HIDDEN),
        lambda: dual(entry),
    ):
        with pytest.raises(NotImplementedError, match=NO_FORWARD_MODE):
            attempt()


def test_vmap_is_refused() -> None:
    def pair(hidden: Tensor, targets: Tensor) -> Tensor:
        return dpo_loss(hidden, WEIGHT, targets).loss

    pairs = (HIDDEN.unflatten(0, (2, -1)).transpose(0, 1), TARGETS.unflatten(0, (2, -1)).transpose(0, 1))
    for attempt in (
        lambda: torch.func.vmap(lambda h, y: token_logps(h, WEIGHT, y).logps)(HIDDEN, TARGETS),
        lambda: torch.func.vmap(lambda w: token_logps(HIDDEN, w, TARGETS).logps)(WEIGHT[None]),
        lambda: torch.func.vmap(pair)(*pairs),
        lambda: torch.func.vmap(torch.func.grad(pair))(*pairs),
    ):
        with pytest.raises(NotImplementedError, match=NO_VMAP):
            attempt()
    with pytest.raises(NotImplementedError, match="backward pass cannot be vmapped .*: call backward once for each"):
        torch.func.jacrev(lambda h: token_logps(h, WEIGHT, TARGETS).logps)(HIDDEN)


# --------------------------------------------------------------------------------------------------- second derivative


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("of", [0, 1, 2], ids=["hidden", "weight", "bias"])
def test_second_derivative_is_refused_and_never_taken_for_zero(entry: Callable[..., Tensor], of: int) -> None:
    """Whichever way it is asked for, also where the incoming gradient is a constant."""
    leaves = [x.clone().requires_grad_() for x in INPUTS]
    (grad,) = torch.autograd.grad(entry(*leaves), leaves[of], create_graph=True)
    torch.testing.assert_close(grad, value_and_grads(entry, *INPUTS)[1 + of])
    for by in leaves:
        with pytest.raises(NotImplementedError, match=NO_SECOND):
            torch.autograd.grad(grad.sum(), by, allow_unused=True, retain_graph=True)
    with pytest.raises(NotImplementedError, match=NO_SECOND):
        (entry(*leaves) + grad.norm()).backward()

    def of_one(x: Tensor) -> Tensor:
        return entry(*INPUTS[:of], x, *INPUTS[of + 1 :])

    for attempt in (
        lambda: torch.autograd.functional.hessian(of_one, INPUTS[of]),
        lambda: torch.autograd.functional.hvp(of_one, INPUTS[of], INPUTS[of]),
        lambda: torch.func.grad(lambda x: torch.func.grad(of_one)(x).sum())(INPUTS[of]),
    ):
        with pytest.raises(NotImplementedError, match=NO_SECOND):
            attempt()


def test_second_derivative_through_the_head_is_refused() -> None:
    model = make_model("gpt2")
    logps = FusedHead(model)(model, IDS, None, TARGETS).logps
    (grad,) = torch.autograd.grad(logps.sum(), model.transformer.ln_f.weight, create_graph=True)
    with pytest.raises(NotImplementedError, match=NO_SECOND):
        grad.sum().backward()


def test_what_the_message_recommends_is_there() -> None:
    hidden = HIDDEN.double().requires_grad_()
    value = reference.token_logps(hidden, WEIGHT.double(), TARGETS).logps.sum()
    (grad,) = torch.autograd.grad(value, hidden, create_graph=True)
    assert torch.autograd.grad(grad.square().sum(), hidden)[0].abs().sum() > 0


# ------------------------------------------------------------------------------------------------------ checkpointing


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_the_head(entry: Callable[..., Tensor], use_reentrant: bool) -> None:
    expected = value_and_grads(entry, *INPUTS)
    got = value_and_grads(lambda *inputs: checkpoint(entry, *inputs, use_reentrant=use_reentrant), *INPUTS)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("min_group", [SMALL, WHOLE])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_a_model_with_its_loss(use_reentrant: bool, min_group: int) -> None:
    model = TinyModel()
    with groups_of(min_group):
        model(IDS, TARGETS).backward()
        expected = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        # The reentrant kind wants an input with a gradient.
        anchor = torch.zeros((), requires_grad=True)
        loss = checkpoint(lambda x: x + model(IDS, TARGETS), anchor, use_reentrant=use_reentrant)
        loss.backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, grad)


# ---------------------------------------------------------------------- accumulation, frozen inputs, tied weights


@pytest.mark.parametrize("entry", ENTRIES)
def test_gradients_accumulate(entry: Callable[..., Tensor]) -> None:
    """Over backward passes of two graphs, and of one graph twice."""
    first, second = value_and_grads(entry, *INPUTS)[1:], value_and_grads(entry, HIDDEN.flip(0), WEIGHT, BIAS)[1:]
    leaves = [x.clone().requires_grad_() for x in INPUTS]
    value = entry(*leaves)
    value.backward(retain_graph=True)
    value.backward()
    entry(leaves[0].detach().flip(0), *leaves[1:]).backward()
    torch.testing.assert_close(leaves[0].grad, 2 * first[0])
    for leaf, a, b in zip(leaves[1:], first[1:], second[1:], strict=True):
        torch.testing.assert_close(leaf.grad, 2 * a + b)


@pytest.mark.parametrize("min_group", [SMALL, WHOLE])
def test_micro_batches_add_up_to_the_batch(min_group: int) -> None:
    model = TinyModel()
    with groups_of(min_group):
        model(IDS, TARGETS).backward()
        expected = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        model.loss = DPOLoss(beta=0.5)
        for pair in range(PAIRS):
            rows = torch.tensor([pair, PAIRS + pair])
            hidden = model.hidden(IDS[rows])
            ref_hidden = model.hidden(IDS).detach().flip(0)[rows]
            output = model.loss(hidden, model.head.weight, TARGETS[rows], bias=model.head.bias, ref_hidden=ref_hidden)
            (output.loss / PAIRS).backward()
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]
)
def test_what_is_frozen_changes_nothing_for_the_rest(entry: Callable[..., Tensor], needs: tuple[int, ...]) -> None:
    value, *grads = value_and_grads(entry, *INPUTS)
    got_value, *got = value_and_grads(entry, *INPUTS, needs=needs)
    torch.testing.assert_close(got_value, value)
    for grad, expected, need in zip(got, grads, needs, strict=True):
        assert (grad is not None) == bool(need)
        if need:
            torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("entry", ENTRIES)
def test_without_gradients(entry: Callable[..., Tensor]) -> None:
    expected = value_and_grads(entry, *INPUTS)[0]
    leaves = [x.clone().requires_grad_() for x in INPUTS]
    frozen = entry(*INPUTS)
    with torch.no_grad():
        unrecorded = entry(*leaves)
    with torch.inference_mode():
        inferred = entry(*leaves)
        assert inferred.is_inference()
    for value in (frozen, unrecorded, inferred):
        assert not value.requires_grad
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("min_group", [SMALL, WHOLE])
def test_a_tied_weight_gets_both_gradients(min_group: int) -> None:
    tied, apart = TinyModel(), TinyModel()
    apart.head.weight = nn.Parameter(apart.embedding.weight.detach().clone())
    with groups_of(min_group):
        for model in (tied, apart):
            model(IDS, TARGETS).backward()
    assert apart.head.weight.grad.any() and apart.embedding.weight.grad.any()
    torch.testing.assert_close(tied.head.weight.grad, apart.head.weight.grad + apart.embedding.weight.grad)


# ------------------------------------------------------------------------------------------------------------ layouts

LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.clone(),
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every second": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "with an offset": lambda x: torch.cat([x, x])[len(x) :],
    "expanded": lambda x: x[:1].expand_as(x),
}


@settings(max_examples=40)
@given(
    entry=st.sampled_from(ENTRIES),
    layouts=st.tuples(*(st.sampled_from([*LAYOUTS]) for _ in INPUTS)),
)
def test_any_layout(entry: Callable[..., Tensor], layouts: tuple[str, ...]) -> None:
    """Gradients arrive at the leaves that a view was taken of."""
    results = []
    for copied in (False, True):
        leaves = [x.clone().requires_grad_() for x in INPUTS]
        views = [LAYOUTS[layout](leaf) for layout, leaf in zip(layouts, leaves, strict=True)]
        value = entry(*(view.contiguous() for view in views) if copied else views)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("entry", [token_logps, lambda h, w, y: dpo_loss(h, w, y)])
def test_targets_of_any_layout(entry: Callable[..., Any]) -> None:
    results = []
    for layout in ("contiguous", "transposed", "every second", "with an offset"):
        output = entry(HIDDEN, WEIGHT, LAYOUTS[layout](TARGETS))
        results.append(output.logps if entry is token_logps else output.losses)
    for result in results[1:]:
        assert torch.equal(result, results[0])


# ----------------------------------------------------------------------------------------- shapes alone, and defaults


@pytest.mark.parametrize("entry", [of_tokens, of_pairs, of_packed_pairs])
def test_meta_tensors_give_shapes(entry: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TARGETS", "REF_LOGPS", "BOUNDS"):
        monkeypatch.setitem(globals(), name, globals()[name].to("meta"))
    value, *grads = value_and_grads(entry, *(x.to("meta") for x in INPUTS))
    assert (value.shape, value.dtype, value.device.type) == ((), torch.float32, "meta")
    assert [grad.shape for grad in grads] == [x.shape for x in INPUTS]


@pytest.mark.parametrize("entry", [of_tokens, of_pairs, of_packed_pairs])
def test_fake_tensors_give_shapes(entry: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode() as mode:
        for name in ("TARGETS", "REF_LOGPS", "BOUNDS"):
            monkeypatch.setitem(globals(), name, mode.from_tensor(globals()[name]))
        value, *grads = value_and_grads(entry, *(mode.from_tensor(x) for x in INPUTS))
    assert (value.shape, value.dtype, value.device.type) == ((), torch.float32, "cpu")
    assert [grad.shape for grad in grads] == [x.shape for x in INPUTS]


@contextmanager
def other_default(which: str) -> Iterator[None]:
    if which == "float64":
        torch.set_default_dtype(torch.float64)
    else:
        torch.set_default_device(which)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


@pytest.mark.parametrize("which", ["float64", "meta"])
@pytest.mark.parametrize("entry", ENTRIES)
def test_default_dtype_and_device_change_nothing(entry: Callable[..., Tensor], which: str) -> None:
    expected = value_and_grads(entry, *INPUTS)
    with other_default(which):
        got = value_and_grads(entry, *INPUTS)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and a.device == b.device
        assert torch.equal(a, b)


@pytest.mark.parametrize("which", ["float64", "meta"])
def test_default_dtype_and_device_change_nothing_for_the_head(which: str) -> None:
    model = make_model("gemma2")  # whose softcap is to be found out
    expected = FusedHead(model)(model, IDS, None, TARGETS).logps
    with other_default(which):
        got = FusedHead(model)(model, IDS, None, TARGETS).logps
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected)


# ----------------------------------------------------------------------------------------------- modules and messages


def test_the_module_is_copied_pickled_and_has_no_state() -> None:
    module = DPOLoss(beta=0.3, loss_type="ipo", workspace=0)
    expected = module(HIDDEN, WEIGHT, TARGETS).loss
    assert module.state_dict() == {} and list(module.parameters()) == []
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(other) == repr(module)
        assert torch.equal(other(HIDDEN, WEIGHT, TARGETS).loss, expected)
    output = module(HIDDEN, WEIGHT, TARGETS)
    assert torch.equal(pickle.loads(pickle.dumps(output)).losses, output.losses)


@pytest.mark.parametrize(
    ("mark", "message"),
    [("ds_id", "DeepSpeed ZeRO-3 has partitioned it: compute the loss in the forward"), (None, "both at least 1$")],
)
def test_a_partitioned_weight_is_refused(mark: str | None, message: str) -> None:
    weight = nn.Parameter(torch.empty(0))
    if mark:
        setattr(weight, mark, 0)
    for call in (token_logps, dpo_loss):
        with pytest.raises(ValueError, match=rf"weight has shape \(0,\); .*{message}"):
            call(HIDDEN, weight, TARGETS)
