"""Level 1 whole: Hopper's kernels (TMA, wgmma, mbarriers, clusters) and their call, run from nvcc's PTX.

Needs CUTLASS; the first run compiles five kernels, which takes a minute of a processor's time. A small set runs with
every test run, the rest with --run-slow.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_calls import OP_OUTPUTS, Case, assert_cuda_matches, call, random_case
from ptxrun.machine import Machine

pytestmark = pytest.mark.usefixtures("on_device")

# Which of the five kernels a call has for its product.
KERNELS = {
    "bf16_operand": (torch.bfloat16, ("hidden", "weight"), ()),
    "bf16_operand_extras": (torch.bfloat16, ("hidden", "weight"), OP_OUTPUTS),
    "bf16_sums": (torch.bfloat16, (), ()),
    "bf16_sums_extras": (torch.bfloat16, (), OP_OUTPUTS),
    "fp16_sums": (torch.float16, (), ()),
}
# Rows, columns, depth, multiprocessors. The tile is 128 x 192 x 64, a cluster has two tiles of rows, and the pipeline
# five stages. So: a ragged edge everywhere; more k-tiles than stages, so that every stage is used again; several
# clusters, with several tiles for each.
SHAPES = {
    "ragged": (300, 401, 72, 2),
    "deep": (130, 200, 456, 2),
    "clusters": (520, 600, 64, 4),
}
SCHEDULES = {
    "in order": {},
    "at random": {"random": True, "seed": 1},
    "late": {"late": True},
    "late, at random": {"late": True, "random": True, "perturb": True, "seed": 2},
}


def run(level1: Any, machine: Machine, kernel: str, shape: str, schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns, depth, multiprocessors = SHAPES[shape]
    dtype, needs, extras = KERNELS[kernel]
    monkeypatch.setenv("FASTDPO_CUDA_LEVEL", "1")
    monkeypatch.setenv("FASTDPO_CUDA_BLOCKS", f"{rows},{-(-columns // 192) * 192}")
    level1.pretend(90, multiprocessors)
    case = random_case(0, rows, depth, columns, dtype, ignored=0.02)
    case.targets[0] = columns - 1
    machine.launched()
    before = machine.counts()
    with machine.with_options(**SCHEDULES[schedule]):
        results = call(level1, case, needs=needs, extras=extras)
    assert_cuda_matches(case, results)
    assert all(level1.written(t) for t in results.tensors())
    ran = machine.counts() - before
    assert any("cutlass13device_kernel" in name for name in machine.launched())
    assert ran.wgmmas > 0 and ran.tma_bytes > 0 and ran.mbarrier_phases > 0


@pytest.mark.parametrize(
    ("kernel", "shape", "schedule"),
    [
        ("bf16_operand", "ragged", "late, at random"),
        ("bf16_operand_extras", "ragged", "late"),
        ("bf16_sums", "deep", "late, at random"),
        ("bf16_sums_extras", "ragged", "at random"),
        ("fp16_sums", "deep", "in order"),
    ],
)
def test_matches_the_oracle(
    level1: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch, kernel: str, shape: str, schedule: str
) -> None:
    run(level1, machine, kernel, shape, schedule, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_shape_and_schedule(
    level1: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch, kernel: str, shape: str, schedule: str
) -> None:
    run(level1, machine, kernel, shape, schedule, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_raised_rows_and_several_chunks(
    level1: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Rows that settle_rows puts right, with an operand kept in part, in chunks and token blocks."""
    monkeypatch.setenv("FASTDPO_CUDA_LEVEL", "1")
    monkeypatch.setenv("FASTDPO_CUDA_BLOCKS", "136,192")
    case: Case = random_case(seed, 150, 64, 400, torch.bfloat16, spread=20.0, ignored=0.1, temperature=0.7)
    with machine.with_options(late=True, random=True, seed=seed):
        results = call(level1, case, retained_rows=40, extras=OP_OUTPUTS if seed % 2 else ())
    assert_cuda_matches(case, results)
