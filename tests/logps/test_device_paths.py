"""Which path a device takes; and all that is made of the ops, on the portable one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from grouped_losses import SMALL, WHOLE, assert_same, is_grouped, make_batch
from grouped_losses import run as run_loss
from op_calls import DTYPES, OP_OUTPUTS, random_case
from oracle import relative_error
from portable_ops import without_float64
from primitive_inputs import assert_matches, make_inputs
from ranks import on_ranks
from torch import Tensor

import fastdpo
from fastdpo import LowRankUpdate, build_info, dpo_loss, token_logps
from fastdpo.logps import OUTPUTS, cuda_devices, low_rank_rows, native, portable
from fastdpo.logps import oracle as reference
from fastdpo.logps.device_paths import is_portable, portable_everywhere


@pytest.fixture
def calls() -> Iterator[list[str]]:
    """All tensors go through plain PyTorch; what the forward op was called for."""
    seen: list[str] = []
    forward = portable._Forward

    def counted(problem: Any, *args: Any) -> Any:
        seen.append(str(problem.hidden.dtype))
        return forward(problem, *args)

    with portable_everywhere(), patch.object(portable, "_Forward", counted):
        yield seen
    assert seen


# ------------------------------------------------------------------------------------------- who computes


@pytest.mark.parametrize("op", ["forward", "backward"])
def test_every_device_has_the_ops(op: str) -> None:
    for key in ("CPU", "CUDA", "MPS", "XPU", "HPU", "MTIA", "PrivateUse1"):
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"fastdpo::token_logps_{op}", key), key


def test_which_path_a_device_takes() -> None:
    assert not is_portable(torch.device("cpu"))
    assert is_portable(torch.device("mps")) and is_portable(torch.device("xpu", 1))
    assert is_portable(torch.device("cuda")) == (build_info()["cuda_library"] != "loaded")
    with portable_everywhere():
        assert is_portable(torch.device("cpu")) and is_portable(torch.device("cuda"))
        with portable_everywhere():
            pass
        assert is_portable(torch.device("cpu"))
    assert not is_portable(torch.device("cpu"))


def test_the_kernels_are_back_where_the_portable_path_was_left() -> None:
    case = random_case(0, 20, 8, 50, torch.float32)
    before = token_logps(case.hidden, case.weight, case.targets).logps
    with (
        portable_everywhere(),
        patch.object(portable, "_Forward", side_effect=RuntimeError("portable")),
        pytest.raises(RuntimeError, match="portable"),
    ):
        token_logps(case.hidden, case.weight, case.targets)
    assert torch.equal(token_logps(case.hidden, case.weight, case.targets).logps, before)


def test_build_info_says_which_path_and_why() -> None:
    info = build_info()
    assert info["paths"]["cpu"] == f"kernels for {info['cpu_path']}, of {info['cpu_library']}"
    if torch.version.cuda is None and torch.version.hip is None:
        assert info["paths"]["cuda"] == "portable: this torch has no CUDA"
    assert info["paths"]["mps, xpu, npu, …"].startswith("portable: fastdpo has kernels for cpu and cuda alone")
    assert info["self_check"] == {}


@pytest.mark.parametrize("variable", ["FASTDPO_CPU_PATH", "FASTDPO_CUDA_PATH"])
def test_the_portable_path_can_be_asked_for(variable: str) -> None:
    code = """
import fastdpo, torch
info = fastdpo.build_info()
print(info["paths"]["cpu"], info["paths"]["cuda"], info["cpu_products"]["bfloat16"], sep="\\n")
logps = fastdpo.token_logps(torch.ones(2, 3), torch.zeros(4, 3), torch.tensor([1, -100])).logps
assert logps.tolist() == [-torch.log(torch.tensor(4.0)), 0.0]
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, variable: "portable"},
    )
    assert done.returncode == 0, done.stderr
    cpu, cuda, products = done.stdout.splitlines()
    if variable == "FASTDPO_CPU_PATH":
        assert (cpu, products) == ("portable: FASTDPO_CPU_PATH is portable", "torch.mm in chunks")
    else:
        assert cuda == "portable: FASTDPO_CUDA_PATH is portable" and cpu.startswith("kernels")


def test_a_path_that_is_not_known() -> None:
    for variable, known in (("FASTDPO_CPU_PATH", "plain or portable"), ("FASTDPO_CUDA_PATH", "portable")):
        done = subprocess.run(
            [sys.executable, "-c", "import fastdpo; fastdpo.token_logps"],
            capture_output=True,
            text=True,
            env={**os.environ, variable: "protable"},
        )
        assert done.returncode != 0 and f"{variable} is 'protable'; it should be " in done.stderr
        assert known in done.stderr


def test_why_the_cuda_library_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4.1")
    assert "this torch is built for ROCm 6.4.1, and fastdpo has kernels for NVIDIA's GPUs" in native._cuda_misfit()
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert native._cuda_misfit() == "this torch has no CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(native, "CUDA_LIBRARY", Path("nowhere"))
    assert "fastdpo was built without nvcc: rebuild it where nvcc is" in native._cuda_misfit()


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((8, 0), ["8.0", "9.0a"], True),
        ((8, 7), ["8.0", "8.6"], True),
        ((8, 0), ["8.6"], False),
        ((9, 0), ["8.0", "9.0a"], True),
        ((9, 1), ["9.0a"], False),
        ((10, 3), ["10.0"], True),
        ((12, 1), ["10.0", "12.0"], True),
        ((7, 5), ["8.0", "8.6", "9.0a"], False),
    ],
)
def test_devices_that_nothing_was_compiled_for(capability: tuple[int, int], archs: list[str], runs: bool) -> None:
    said = cuda_devices.arch_misfit(capability, archs)
    assert (said is None) == runs
    assert runs or said.startswith(f"its compute capability is {capability[0]}.{capability[1]}, and they were compiled")


# ------------------------------------------------------------------------------------------- the primitive


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("retain_bytes", [0, 300 * 1500 * 4, 1 << 30])
def test_many_blocks_and_chunks(calls: list[str], dtype: torch.dtype, retain_bytes: int) -> None:
    inputs = make_inputs(3, 1100, 24, 1500, dtype, bias=True, spread=3.0)
    assert_matches(inputs, 4, softcap=20.0, retain_bytes=retain_bytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(calls: list[str], dtype: torch.dtype) -> None:
    hidden, weight, targets, bias = make_inputs(13, 11, 8, 40, dtype, bias=True)
    scalars = {"ignore_index": -100, "num_scored": -1, "logit_scale": 0.5, "softcap": 9.0, "temperature": 1.5}
    options = {"need_direction": True, "retain_bytes": 40 * 4 * 5} | dict.fromkeys(OP_OUTPUTS, True)
    torch.library.opcheck(torch.ops.fastdpo.token_logps_forward, (hidden, weight, targets, bias), scalars | options)
    results = torch.ops.fastdpo.token_logps_forward(hidden, weight, targets, bias, **scalars, **options)
    for sums in ((None, None), (torch.randn(40, 8), torch.randn(40))):
        torch.library.opcheck(
            torch.ops.fastdpo.token_logps_backward,
            (torch.ones(11), hidden, weight, targets, bias, *results[1:4], *sums),
            scalars | {"need_hidden": True, "need_weight": True, "need_bias": True},
        )


@pytest.mark.parametrize("retain_bytes", [0, 1 << 20])
def test_gradcheck(calls: list[str], retain_bytes: int) -> None:
    hidden, weight, targets, bias = make_inputs(14, 6, 5, 11, torch.float64, bias=True)
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda h, w, b: token_logps(h, w, targets, b, softcap=3.0, logit_scale=0.7, retain_bytes=retain_bytes).logps,
        inputs,
    )


def test_under_autocast(calls: list[str]) -> None:
    """Both inputs are cast, and nothing within: float32 logits of them."""
    hidden, weight, targets, bias = make_inputs(12, 30, 16, 300, torch.float32, bias=True)
    expected = token_logps(hidden.bfloat16(), weight.bfloat16(), targets, bias).logps
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        result = token_logps(hidden, weight, targets, bias).logps
        result.sum().backward()
    assert torch.equal(result, expected) and weight.grad.dtype == torch.float32


def test_in_a_compiled_graph(calls: list[str]) -> None:
    """One graph, compiled once, of tokens and of pairs; the op in it is the device's."""
    hidden, weight, targets, bias = make_inputs(2, 24, 8, 50, torch.float32, bias=True)

    def of_tokens(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return token_logps(h, w, targets, b, outputs=OUTPUTS).logps.square().sum()

    def of_pairs(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return dpo_loss(
            h.view(4, 6, 8), w, targets.view(4, 6), bias=b, ref_hidden=h.detach().flip(0).view(4, 6, 8)
        ).loss

    for entry in (of_tokens, of_pairs):
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        found = []
        for function in (torch.compile(entry, fullgraph=True, backend=counter), entry):
            leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
            before = len(calls)
            value = function(*leaves)
            found.append((value.detach(), *torch.autograd.grad(value, leaves)))
            assert len(calls) > before
        torch.testing.assert_close(*found)
        assert counter.frame_count == 1


# ------------------------------------------------------------------------------------------- what is made of it


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("packed", [False, True])
def test_dpo_loss_in_groups(calls: list[str], dtype: torch.dtype, packed: bool) -> None:
    batch = make_batch(0, 8, 20, 16, 203, dtype)
    how = {"factor": 1 / 3, "packed": packed, "outputs": ["entropy", "is_top1"]}
    ours = run_loss(batch, min_group=SMALL, workspace=batch.room_for(30), **how)
    whole = run_loss(batch, min_group=WHOLE, **how)
    assert is_grouped(ours[0]) and not is_grouped(whole[0])
    assert_same(ours, whole, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("retain_bytes", [0, 1 << 20])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_low_rank_update(
    calls: list[str], dtype: torch.dtype, retain_bytes: int, frozen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several chunks of the vocabulary, against the whole weight in float64."""
    monkeypatch.setattr(low_rank_rows, "_CPU_CHUNK_BYTES", 4096)
    case = random_case(1, 30, 12, 400, dtype, bias=torch.float32)
    a, b = torch.randn(4, 12).to(dtype), (0.3 * torch.randn(400, 4)).to(dtype)
    needs = {"hidden": case.hidden, "a": a, "b": b} | ({} if frozen else {"weight": case.weight})
    leaves = {name: x.clone().requires_grad_() for name, x in needs.items()}
    result = token_logps(
        leaves["hidden"],
        leaves.get("weight", case.weight),
        case.targets,
        case.bias,
        low_rank=LowRankUpdate(leaves["a"], leaves["b"], 1.5),
        retain_bytes=retain_bytes,
    ).logps
    grads = torch.autograd.grad(result, list(leaves.values()), case.grad_logps)
    exact = {name: x.double().requires_grad_() for name, x in needs.items()}
    weight = exact.get("weight", case.weight.double()) + 1.5 * exact["b"] @ exact["a"]
    truth = reference.token_logps(exact["hidden"], weight, case.targets, case.bias.double()).logps
    of_truth = torch.autograd.grad(truth, list(exact.values()), case.grad_logps.double())
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4 * 2.0**-11, torch.bfloat16: 4 * 2.0**-8}
    torch.testing.assert_close(result.double(), truth, rtol=1e-5, atol=1e-5)
    for name, grad, expected in zip(leaves, grads, of_truth, strict=True):
        assert relative_error(grad, expected) <= tolerance[dtype], name


def logps_of_rank() -> list[Tensor]:
    """Log-probabilities and gradients over a vocabulary of which this rank has a part, in float64."""
    assert build_info()["cpu_path"] == "portable"
    case, rank = random_case(5, 24, 10, 41, torch.float64, bias=torch.float64), dist.get_rank()
    part = slice(0, 17) if rank == 0 else slice(17, 41)
    leaves = [x.clone().requires_grad_() for x in (case.hidden, case.weight[part], case.bias[part])]
    logps = token_logps(*leaves[:2], case.targets, leaves[2], retain_bytes=10 * 17 * 8, group=dist.group.WORLD).logps
    return [logps.detach(), *torch.autograd.grad(logps, leaves, case.grad_logps)]


def test_a_vocabulary_over_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDPO_CPU_PATH", "portable")
    first, second = on_ranks(logps_of_rank, 2, tmp_path, anew=True)
    case = random_case(5, 24, 10, 41, torch.float64, bias=torch.float64)
    leaves = [x.clone().requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    logps = reference.token_logps(*leaves[:2], case.targets, leaves[2]).logps
    expected = [logps.detach(), *torch.autograd.grad(logps, leaves, case.grad_logps)]
    found = [*first[:2], *(torch.cat(parts) for parts in zip(first[2:], second[2:], strict=True))]
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("packed", [False, True])
def test_a_loss_on_a_device_without_float64(calls: list[str], packed: bool) -> None:
    """Sums and losses of float32, in groups, with a low-rank update, and of every output."""
    batch = make_batch(0, 8, 20, 16, 203, torch.float32)
    how = {"packed": packed, "outputs": ["entropy", "mean_logits", "is_top1"]}
    expected = run_loss(batch, min_group=SMALL, workspace=batch.room_for(30), **how)
    with without_float64():
        found = run_loss(batch, min_group=SMALL, workspace=batch.room_for(30), **how)
        update = LowRankUpdate(torch.randn(4, 16), torch.randn(203, 4))
        logps = token_logps(batch.hidden, batch.weight, batch.targets, batch.bias, low_rank=update, outputs=OUTPUTS)
        options = {"ld_alpha": 0.3, "use_weighting": True, "low_rank": update, "ref_hidden": batch.hidden}
        assert dpo_loss(batch.hidden, batch.weight, batch.targets, **options).loss.dtype == torch.float32
    assert logps.logps.isfinite().all()
    assert_same(found, expected, torch.float32)


def test_no_device_is_refused() -> None:
    """As far as shapes go; what computes there is PyTorch's own."""
    hidden, weight = torch.empty(2, 3, device="meta"), torch.empty(5, 3, device="meta")
    assert token_logps(hidden, weight, torch.empty(2, dtype=torch.int64, device="meta")).logps.shape == (2,)


def test_import_is_silent() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import fastdpo; fastdpo.token_logps"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert fastdpo.__version__
