"""Two processes: DDP, FSDP2 and DTensors around the head, and around the loss called by hand.

One pair of processes runs every check; each check leaves what it found on both, and a test reads that. The truth is a
single process's, on both ranks' pairs together.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from grouped_losses import SMALL, groups_of
from processes import spawn
from tiny_models import make_model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from fastdpo import DPOLoss, dpo_loss, token_logps
from fastdpo.model.head import FusedHead

pytestmark = pytest.mark.usefixtures("one_thread")

RANKS, PAIRS, LENGTH, H, V = 2, 2, 6, 8, 11  # an odd vocabulary: shards of 6 and 5 rows
Batch = dict[str, Tensor]


def make_batch(seed: int, vocabulary: int = V) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    shape = (2 * PAIRS, LENGTH)
    batch = {name: torch.randint(0, vocabulary, shape, generator=generator) for name in ("ids", "targets")}
    batch["targets"][:, 0] = -100
    return batch | {"ref_logps": -10 + torch.randn(2 * PAIRS, generator=generator)}


def joint(batches: list[Batch]) -> Batch:
    """Chosen rows first, as in each of them."""
    halves = [{name: x.chunk(2) for name, x in batch.items()} for batch in batches]
    return {name: torch.cat([half[name][i] for i in range(2) for half in halves]) for name in batches[0]}


class TinyModel(nn.Module):
    """Returns hidden states, or with ``loss_inside`` the loss."""

    def __init__(self, *, tied: bool = True, loss_inside: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(V, H)
        self.body = nn.Linear(H, H)
        self.head = nn.Linear(H, V)
        if tied:
            self.head.weight = self.embedding.weight
        self.loss = DPOLoss(beta=0.5)
        self.loss_inside = loss_inside

    def forward(self, batch: Batch) -> Tensor:
        hidden = torch.tanh(self.body(self.embedding(batch["ids"])))
        return self.loss_of(hidden, batch) if self.loss_inside else hidden

    def loss_of(self, hidden: Tensor, batch: Batch) -> Tensor:
        head = (self.head.weight, batch["targets"])
        return self.loss(hidden, *head, bias=self.head.bias, ref_logps=batch["ref_logps"]).loss


def grads_of(module: nn.Module) -> dict[str, Tensor]:
    """Whole and copied; collective where they are sharded."""
    grads = {name.removeprefix("module."): p.grad for name, p in module.named_parameters() if p.grad is not None}
    return {name: (g.full_tensor() if isinstance(g, DTensor) else g).clone() for name, g in grads.items()}


def expected_grads(seeds: tuple[int, ...] = (0, 1), **options: bool) -> dict[str, Tensor]:
    model = TinyModel(loss_inside=True, **options)
    model(joint([make_batch(seed) for seed in seeds])).backward()
    return grads_of(model)


def communication(mode: CommDebugMode) -> dict[str, int]:
    """How many collectives of each kind, under the names of the field."""
    counts = {"gathers": 0, "reduce-scatters": 0}
    for op, count in mode.get_comm_counts().items():
        counts["gathers"] += count * ("gather" in str(op))
        counts["reduce-scatters"] += count * ("reduce_scatter" in str(op))
    return counts


# ------------------------------------------------------------------------------------------- what each process does


def ddp_with_the_loss_inside(rank: int, mesh: DeviceMesh, **options: bool) -> Any:
    model = DistributedDataParallel(TinyModel(loss_inside=True), **options)
    steps = []
    for _ in range(3):
        model.zero_grad()
        model(make_batch(rank)).backward()
        steps.append(grads_of(model))
    return steps


def ddp_with_groups(rank: int, mesh: DeviceMesh) -> Any:
    model = DistributedDataParallel(TinyModel(loss_inside=True))
    with groups_of(SMALL):
        loss = model(make_batch(rank))
    loss.backward()
    return grads_of(model)


def ddp_no_sync(rank: int, mesh: DeviceMesh) -> Any:
    model = DistributedDataParallel(TinyModel(loss_inside=True))
    with model.no_sync():
        (model(make_batch(rank)) / 2).backward()
    own = grads_of(model)
    (model(make_batch(2 + rank)) / 2).backward()
    return own, grads_of(model)


def ddp_with_the_loss_outside(rank: int, mesh: DeviceMesh, *, tied: bool, **options: bool) -> Any:
    model = DistributedDataParallel(TinyModel(tied=tied), **options)
    steps = []
    for _ in range(3):
        model.zero_grad()
        batch = make_batch(rank)
        model.module.loss_of(model(batch), batch).backward()
        steps.append(grads_of(model))
    return steps


def ddp_past_its_forward(rank: int, mesh: DeviceMesh) -> Any:
    model = DistributedDataParallel(TinyModel())
    batch = make_batch(rank)
    model.module.loss_of(model.module(batch), batch).backward()
    return grads_of(model)


def head_batch(seed: int, vocabulary: int) -> Batch:
    batch = make_batch(seed, vocabulary)
    return {"input_ids": batch["ids"], "attention_mask": torch.ones_like(batch["ids"]), "labels": batch["targets"]}


def head_ddp_no_sync(rank: int, mesh: DeviceMesh) -> Any:
    model = make_model("gpt2", 50)
    head, wrapped = FusedHead(model), DistributedDataParallel(model)
    with wrapped.no_sync():
        head(wrapped, **head_batch(rank, 50)).logps.mean().backward()
    own = grads_of(wrapped)
    head(wrapped, **head_batch(2 + rank, 50)).logps.mean().backward()
    return own, grads_of(wrapped)


# More entries than the kernels take at once, so that a gather for each chunk would be seen.
MANY = 9001


def head_fsdp_tied(rank: int, mesh: DeviceMesh) -> Any:
    model = make_model("gpt2", MANY)
    head = FusedHead(model)
    fully_shard([model.get_input_embeddings(), model.get_output_embeddings()], mesh=mesh)
    head.inspect(fully_shard(model, mesh=mesh))
    sharded = isinstance(model.lm_head.weight, DTensor)
    with CommDebugMode() as forward:
        logps = head(model, **head_batch(rank, MANY)).logps
    with CommDebugMode() as backward:
        logps.mean().backward()
    kinds = {type(p.grad).__name__ for p in model.parameters()}
    return sharded, communication(forward), communication(backward), kinds, grads_of(model)


def sharded_model(mesh: DeviceMesh, *, tied: bool) -> TinyModel:
    """Whose output embedding is sharded whenever its module does not run."""
    model = TinyModel(tied=tied)
    together = [model.embedding, model.head] if tied else [model.head]
    fully_shard(together, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp_with_the_loss_outside(rank: int, mesh: DeviceMesh, *, tied: bool, grouped: bool = False) -> Any:
    """The policy's head is the reference's as well; together they are one gather of the weight and one of the bias."""
    model, batch = sharded_model(mesh, tied=tied), make_batch(rank)
    hidden = model(batch)
    assert isinstance(model.head.weight, DTensor)
    head = {"weight": model.head.weight, "bias": model.head.bias, "targets": batch["targets"]}
    with groups_of(SMALL if grouped else 1 << 62):
        with CommDebugMode() as forward:
            loss = dpo_loss(hidden, **head, ref_hidden=hidden.detach().flip(1), workspace=1000).loss
        loss.backward()
    return communication(forward), type(model.head.weight.grad).__name__, grads_of(model)


def fsdp_with_a_root_that_stays_whole(rank: int, mesh: DeviceMesh) -> Any:
    """FSDP2 keeps the root's own parameters gathered after its forward."""
    model, batch = fully_shard(TinyModel(), mesh=mesh), make_batch(rank)
    hidden = model(batch)
    kind = type(model.head.weight).__name__
    model.loss_of(hidden, batch).backward()
    return kind, type(model.head.weight.grad).__name__, grads_of(model)


def fsdp_in_bfloat16(rank: int, mesh: DeviceMesh) -> Any:
    """A float32 DTensor and 16-bit hidden states: refused with what to do, or cast, or under autocast."""
    weight = nn.Parameter(distribute_tensor(TinyModel().head.weight.detach(), mesh, [Shard(0)]))
    hidden, targets = make_hidden(rank).bfloat16(), make_batch(rank)["targets"]
    try:
        token_logps(hidden, weight, targets)
    except TypeError as error:
        message = str(error)
    token_logps(hidden, weight.to(hidden.dtype), targets).logps.mean().backward()
    cast, weight.grad = weight.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        token_logps(hidden, weight, targets).logps.mean().backward()
    return message, cast.dtype, cast.full_tensor(), weight.grad.full_tensor()


def make_hidden(seed: int) -> Tensor:
    return torch.randn(2 * PAIRS, LENGTH, H, generator=torch.Generator().manual_seed(seed))


def tensor_parallel_weight(rank: int, mesh: DeviceMesh) -> Any:
    """Every rank has the same tokens, as in tensor parallelism, of which the mean is the gradient."""
    weight = nn.Parameter(distribute_tensor(TinyModel().head.weight.detach(), mesh, [Shard(0)]))
    hidden = make_hidden(0).requires_grad_()
    dpo_loss(hidden, weight, make_batch(0)["targets"]).loss.backward()
    return hidden.grad, weight.grad.full_tensor()


def without_gradients(rank: int, mesh: DeviceMesh) -> Any:
    weight = nn.Parameter(distribute_tensor(TinyModel().head.weight.detach(), mesh, [Shard(0)]))
    with torch.no_grad(), CommDebugMode() as mode:
        logps = token_logps(make_hidden(0), weight, make_batch(0)["targets"]).logps
    return communication(mode), logps


def sharded_tokens(rank: int, mesh: DeviceMesh) -> Any:
    weight = distribute_tensor(TinyModel().head.weight.detach(), mesh, [Shard(0)])
    hidden, targets = make_hidden(0), make_batch(0)["targets"]
    sharded = {"hidden": distribute_tensor(hidden, mesh, [Shard(0)])}
    sharded["targets"] = distribute_tensor(targets, mesh, [Shard(0)])
    messages = []
    for call in (token_logps, dpo_loss):
        for name, value in sharded.items():
            try:
                call(**({"hidden": hidden, "weight": weight, "targets": targets} | {name: value}))
            except TypeError as error:
                messages.append(str(error))
    return messages


def fsdp1_outside_its_forward(rank: int, mesh: DeviceMesh) -> Any:
    model = FullyShardedDataParallel(TinyModel(tied=False), use_orig_params=True, device_id=torch.device("cpu"))
    batch = make_batch(rank)
    with torch.no_grad():
        hidden = model(batch)
    try:
        dpo_loss(hidden, model.head.weight, batch["targets"])
    except ValueError as error:
        return str(error)


CHECKS: dict[str, tuple[Callable[..., Any], dict[str, bool]]] = {
    "ddp": (ddp_with_the_loss_inside, {}),
    "ddp, unused parameters": (ddp_with_the_loss_inside, {"find_unused_parameters": True}),
    "ddp, static graph": (ddp_with_the_loss_inside, {"static_graph": True}),
    "ddp, groups": (ddp_with_groups, {}),
    "ddp, no_sync": (ddp_no_sync, {}),
    "ddp, outside, tied": (ddp_with_the_loss_outside, {"tied": True}),
    "ddp, outside, own head": (ddp_with_the_loss_outside, {"tied": False}),
    "ddp, outside, unused": (ddp_with_the_loss_outside, {"tied": False, "find_unused_parameters": True}),
    "ddp, past its forward": (ddp_past_its_forward, {}),
    "head, ddp, no_sync": (head_ddp_no_sync, {}),
    "head, fsdp, tied": (head_fsdp_tied, {}),
    "fsdp, outside, tied": (fsdp_with_the_loss_outside, {"tied": True}),
    "fsdp, outside, own head": (fsdp_with_the_loss_outside, {"tied": False}),
    "fsdp, outside, groups": (fsdp_with_the_loss_outside, {"tied": True, "grouped": True}),
    "fsdp, whole root": (fsdp_with_a_root_that_stays_whole, {}),
    "fsdp, bfloat16": (fsdp_in_bfloat16, {}),
    "tensor parallel": (tensor_parallel_weight, {}),
    "no gradients": (without_gradients, {}),
    "sharded tokens": (sharded_tokens, {}),
    "fsdp1": (fsdp1_outside_its_forward, {}),
}


def run_checks(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    found: dict[str, Any] = {}
    for name, (check, options) in CHECKS.items():
        try:
            found[name] = check(rank, mesh, **options)
        except Exception:
            found[name] = traceback.format_exc()
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------ what is to be found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Any]]:
    """What the check of that name left on each rank."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    spawn(run_checks, (str(folder),), nprocs=RANKS)
    ranks = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]
    return lambda name: [rank[name] for rank in ranks]


def assert_grads(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert isinstance(got, dict), got  # the check's own error
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "check",
    [
        "ddp",
        "ddp, unused parameters",
        "ddp, static graph",
        "ddp, outside, tied",
        "ddp, outside, own head",
    ],
)
def test_ddp_averages_at_every_step(found: Callable[[str], list[Any]], check: str) -> None:
    expected = expected_grads(tied="own head" not in check)
    for steps in found(check):
        assert len(steps) == 3, steps
        for grads in steps:
            assert_grads(grads, expected)


def test_ddp_averages_what_groups_computed(found: Callable[[str], list[Any]]) -> None:
    for grads in found("ddp, groups"):
        assert_grads(grads, expected_grads())


def test_ddp_leaves_gradients_alone_under_no_sync(found: Callable[[str], list[Any]]) -> None:
    for rank, (own, whole) in enumerate(found("ddp, no_sync")):
        half = {name: grad / 2 for name, grad in expected_grads((rank,)).items()}
        assert_grads(own, half)
        assert_grads(whole, expected_grads((0, 1, 2, 3)))


def test_ddp_refuses_a_head_that_it_took_for_unused(found: Callable[[str], list[Any]]) -> None:
    for text in found("ddp, outside, unused"):
        assert "Expected to mark a variable ready only once" in text
        assert "Use of a module parameter outside the `forward` function" in text


def test_past_ddps_forward_nothing_is_averaged(found: Callable[[str], list[Any]]) -> None:
    """As dpo_loss's documentation says."""
    for rank, grads in enumerate(found("ddp, past its forward")):
        assert_grads(grads, expected_grads((rank,)))


@cache
def head_grads(seed: int, vocabulary: int) -> dict[str, Tensor]:
    model = make_model("gpt2", vocabulary)
    batch = head_batch(seed, vocabulary)
    labels = batch.pop("labels")[:, 1:]
    z = model(**batch).logits[:, :-1]
    (z.log_softmax(-1).gather(-1, labels.unsqueeze(-1))).mean().backward()
    return grads_of(model)


def mean_of(*grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.stack([of[name] for of in grads]).mean(0) for name in grads[0]}


def test_the_head_leaves_gradients_alone_under_no_sync(found: Callable[[str], list[Any]]) -> None:
    seeds = [head_grads(seed, 50) for seed in range(4)]
    for rank, (own, whole) in enumerate(found("head, ddp, no_sync")):
        assert_same_model_grads(own, seeds[rank])
        assert_same_model_grads(whole, {name: 2 * grad for name, grad in mean_of(*seeds).items()})


def assert_same_model_grads(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Of a whole model, where some are rounding errors alone."""
    assert isinstance(got, dict), got
    assert got.keys() == expected.keys()
    largest = max(grad.norm() for grad in expected.values())
    for name, grad in expected.items():
        assert (got[name] - grad).norm() <= 1e-4 * grad.norm() + 1e-6 * largest, name


def test_the_head_under_fsdp_gathers_a_tied_weight_once_a_pass(found: Callable[[str], list[Any]]) -> None:
    expected = mean_of(*(head_grads(rank, MANY) for rank in range(RANKS)))
    for result in found("head, fsdp, tied"):
        assert not isinstance(result, str), result
        sharded, forward, backward, kinds, grads = result
        assert sharded
        # The rest is the root's, which is gathered before: at the inspection.
        assert forward == {"gathers": 1, "reduce-scatters": 0}
        assert backward == {"gathers": 1, "reduce-scatters": 2}
        assert kinds == {"DTensor"}
        assert_same_model_grads(grads, expected)


@pytest.mark.parametrize("check", ["fsdp, outside, tied", "fsdp, outside, own head", "fsdp, outside, groups"])
def test_a_sharded_weight_is_gathered_once_for_policy_and_reference(
    found: Callable[[str], list[Any]], check: str
) -> None:
    model = TinyModel(tied="own head" not in check)
    batch = joint([make_batch(rank) for rank in range(RANKS)])
    hidden = model(batch)
    head = {"weight": model.head.weight, "bias": model.head.bias, "targets": batch["targets"]}
    dpo_loss(hidden, **head, ref_hidden=hidden.detach().flip(1)).loss.backward()
    for result in found(check):
        assert not isinstance(result, str), result
        forward, kind, grads = result
        assert forward == {"gathers": 2, "reduce-scatters": 0}
        assert kind == "DTensor"
        assert_grads(grads, grads_of(model))


def test_a_root_that_fsdp_keeps_whole(found: Callable[[str], list[Any]]) -> None:
    for result in found("fsdp, whole root"):
        assert not isinstance(result, str), result
        kind, kind_of_grad, grads = result
        assert (kind, kind_of_grad) == ("Parameter", "DTensor")
        assert_grads(grads, expected_grads())


def test_a_sharded_float32_weight_with_bfloat16_hidden_states(found: Callable[[str], list[Any]]) -> None:
    weight = TinyModel().head.weight.detach().bfloat16()
    expected = []
    for rank in range(RANKS):
        leaf = weight.clone().float().requires_grad_()
        token_logps(make_hidden(rank).bfloat16().float(), leaf, make_batch(rank)["targets"]).logps.mean().backward()
        expected.append(leaf.grad)
    mean = torch.stack(expected).mean(0)
    for result in found("fsdp, bfloat16"):
        assert not isinstance(result, str), result
        message, dtype, *grads = result
        assert "weight has dtype torch.float32; it should be hidden's, torch.bfloat16: cast one of them" in message
        assert dtype == torch.float32
        for grad in grads:
            assert (grad - mean).norm() <= 2**-7 * mean.norm()


def test_a_sharded_weight_where_every_rank_computes_the_same(found: Callable[[str], list[Any]]) -> None:
    hidden, weight = make_hidden(0).requires_grad_(), TinyModel().head.weight.detach().requires_grad_()
    dpo_loss(hidden, weight, make_batch(0)["targets"]).loss.backward()
    for result in found("tensor parallel"):
        assert not isinstance(result, str), result
        torch.testing.assert_close(result[0], hidden.grad)
        torch.testing.assert_close(result[1], weight.grad)


def test_a_sharded_weight_without_gradients(found: Callable[[str], list[Any]]) -> None:
    expected = token_logps(make_hidden(0), TinyModel().head.weight.detach(), make_batch(0)["targets"]).logps
    for result in found("no gradients"):
        assert not isinstance(result, str), result
        assert result[0] == {"gathers": 1, "reduce-scatters": 0}
        assert torch.equal(result[1], expected)


def test_sharded_tokens_are_refused(found: Callable[[str], list[Any]]) -> None:
    for messages in found("sharded tokens"):
        assert len(messages) == 4, messages
        for name, message in zip(("hidden", "targets") * 2, messages, strict=True):
            assert message.startswith(f"{name} is a DTensor ((Shard(dim=0),)); it should be a plain tensor")
            assert f"{name}.to_local() where it is sharded over tokens" in message


def test_a_weight_that_fsdp1_flattened_is_refused(found: Callable[[str], list[Any]]) -> None:
    for message in found("fsdp1"):
        assert "weight has shape (" in message
        assert "FullyShardedDataParallel has flattened and sharded it: compute the loss in the forward" in message
