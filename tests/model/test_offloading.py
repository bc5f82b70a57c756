"""Offloaded activations: the gradients of a model that keeps them, moved once, and none of its weights among them.

Here the accelerator is the CPU as well: what is moved is copied, and the copy is what the backward gets.
"""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from head_batches import make_batch
from peft import LoraConfig, get_peft_model
from tiny_models import make_model
from torch import Tensor, nn

from fastdpo.data.sequences import TokenSequence
from fastdpo.model.attention import RowAttention
from fastdpo.model.head import FusedHead
from fastdpo.model.offloading import ActivationOffloading, check_offloading, to_host
from fastdpo.model.packing import pack
from fastdpo.model.scoring import score_row

CPU = torch.device("cpu")


class Copies:
    """Makes them, and remembers of what."""

    def __init__(self) -> None:
        self.of: list[tuple[int, tuple[int, ...]]] = []

    def __call__(self, tensor: Tensor) -> Tensor:
        self.of.append((tensor.untyped_storage().data_ptr(), tuple(tensor.shape)))
        return to_host(tensor)


def sequences() -> list[TokenSequence]:
    prompt = list(range(5, 45))
    return [TokenSequence(prompt + [7 + i, 8, 9 + i] * 10, len(prompt), []) for i in range(4)]


def gradients(model: nn.Module, layout: str, copies: Copies | None, **kwargs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    head = FusedHead(model)
    head.inspect(model)
    offloading = None if copies is None else ActivationOffloading(model, CPU, copies)

    def score() -> Tensor:
        if layout == "padded":
            batch = make_batch(length=40)
            return head(model, batch["input_ids"], batch["attention_mask"], batch["labels"]).logps
        return score_row(head, model, pack(sequences(), shared=layout == "shared")).logps

    attention = RowAttention(model, "sdpa") if layout != "padded" else None
    with (
        attention.active() if attention else torch.enable_grad(),
        offloading.active() if offloading else torch.enable_grad(),
    ):
        score().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def model_of(kind: str) -> nn.Module:
    model = make_model("gpt2" if kind == "gpt2" else "mixtral" if kind == "mixtral" else "llama")
    if kind == "adapter":
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    if kind == "checkpointing":
        model.activation_checkpointing_enable()
    return model.train()


@pytest.mark.parametrize("layout", ["shared", "repeated", "padded"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "adapter", "checkpointing"])
def test_gradients_are_the_same_to_the_last_bit(kind: str, layout: str) -> None:
    if kind == "gpt2":
        torch.manual_seed(0)
    model, copies = model_of(kind), Copies()
    if kind == "gpt2":  # it has dropouts
        model.eval()
    expected, got = gradients(model, layout, None), gradients(model, layout, copies)
    assert copies.of
    assert got.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


def test_weights_stay_and_each_tensor_is_moved_once() -> None:
    model, copies = model_of("llama"), Copies()
    gradients(model, "shared", copies)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert not weights & {storage for storage, _ in copies.of}
    # What the head keeps stays: rows of 384 exponentials, as many as tokens are scored.
    row = pack(sequences(), shared=True)
    assert all(shape != (len(row.scored) * 384,) for _, shape in copies.of)
    # Three projections take a layer's normed input, and two another: these are one copy each. The sums that both norms
    # begin with, and what they are divided to: two each. Then what attention and the last projection take.
    of_hidden = [shape for _, shape in copies.of if shape == (row.segments.length * 32,)]
    assert 0 < len(of_hidden) <= 2 * 10 + 2


def test_checkpointing_moves_the_layers_inputs_alone() -> None:
    all_of_them, inputs = Copies(), Copies()
    gradients(model_of("llama"), "repeated", all_of_them)
    gradients(model_of("checkpointing"), "repeated", inputs)
    assert 0 < len(inputs.of) < len(all_of_them.of) / 3


def test_what_is_written_into_in_between_is_another_copy() -> None:
    x = torch.randn(400, requires_grad=True)
    model, copies = make_model("llama"), Copies()

    def compute() -> tuple[Tensor, Tensor]:
        held = x * 1
        (held.detach().requires_grad_() * 1).pow(2)  # autograd keeps held's numbers as they are now, and lets them go
        kept = held.data
        y = (x * kept).sum()
        kept.add_(1)
        z = (x * kept).sum()
        return y, z

    with ActivationOffloading(model, CPU, copies).active():
        y, z = compute()
        (grad_y,) = torch.autograd.grad(y, x, retain_graph=True)
        (grad_z,) = torch.autograd.grad(z, x)
    assert torch.equal(grad_y, x.detach()) and torch.equal(grad_z, x.detach() + 1)


def test_memory_of_what_went_is_not_taken_for_what_was_there() -> None:
    model, copies = make_model("llama"), Copies()
    offloading = ActivationOffloading(model, CPU, copies)
    x = torch.ones(512, requires_grad=True)
    with offloading.active():
        losses = []
        for i in range(20):  # the same memory again and again
            losses.append((x * torch.full((512,), float(i))).sum())
        torch.stack(losses).sum().backward()
    assert torch.equal(x.grad, torch.full((512,), float(sum(range(20)))))
    del losses
    gc.collect()
    assert len(offloading._moved) <= 1  # x's own


def test_what_is_expanded_is_not_written_out() -> None:
    model, copies = make_model("llama"), Copies()
    wide = torch.randn(512, 1, requires_grad=True)
    with ActivationOffloading(model, CPU, copies).active():
        (wide.expand(512, 512) * torch.randn(512, 1).expand(512, 512)).sum().backward()
    assert copies.of and all(shape == (512,) for _, shape in copies.of)


@pytest.mark.parametrize(
    ("device", "settings", "error", "said"),
    [
        ("cpu", {}, ValueError, "computes in the host's memory: leave it out"),
        ("cuda", {"is_sharded": True}, NotImplementedError, "FSDP or DeepSpeed"),
        ("cuda", {"compiles": True}, NotImplementedError, "torch_compile"),
    ],
)
def test_where_it_cannot_be(device: str, settings: dict[str, bool], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        check_offloading(torch.device(device), **{"is_sharded": False, "compiles": False} | settings)
    check_offloading(torch.device("cuda"), is_sharded=False, compiles=False)
