"""Real PTX broken on purpose: each edit must be caught, by a check of the machine or by the oracle.

A sample runs with every test run; the whole list, with the share that is caught, by
``pytest tests/ptx/test_mutations.py --run-slow -s``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from op_calls import OP_OUTPUTS, Case, assert_cuda_matches, call, random_case
from ptxrun import build, ops
from ptxrun.machine import Machine, Options
from ptxrun.mutate import LEVEL0, LEVEL1, Mutation, mutations
from ptxrun.verdict import Call, Verdict, judge, run
from test_level0 import case_of_logits, shifted

pytestmark = pytest.mark.usefixtures("on_device")

ENDLESS = 40_000_000  # instructions of a launch; the longest of these has a tenth of that
ENOUGH = 0.95
EXPLAINED_FOR = "13.0"  # of nvcc, whose PTX the explanations of survivors are about

# Kernels by a part of their name, and what calls them: the dtype, and the level.
KERNELS0 = {
    "RowTraitsIf13__nv_bfloat16LNS0_7RowPassE1ELb1EE": (torch.bfloat16, "0"),
    "RowTraitsIf13__nv_bfloat16LNS0_7RowPassE2ELb0EE": (torch.bfloat16, "0"),
    "RowTraitsIddLNS0_7RowPassE1ELb1EE": (torch.float64, "0"),
    "partition_rows_kernel": (torch.bfloat16, "0"),
    "gather_rows_kernelI5uint4": (torch.bfloat16, "0"),
    "start_rows_kernelI13__nv_bfloat16": (torch.bfloat16, "0"),
    "finish_rows_kernelI6__half": (torch.float16, "0"),
    "fill_rows_kernelIf": (torch.bfloat16, "0"),
    "scale_rows_kernelI13__nv_bfloat16": (torch.bfloat16, "0"),
    "scale_direction_kernelI13__nv_bfloat16": (torch.bfloat16, "0"),
    "settle_rows_kernelI13__nv_bfloat16Lb1E": (torch.bfloat16, "1"),
    "place_targets_kernel": (torch.bfloat16, "1"),
}


def level0_calls(
    library: Any, patch: pytest.MonkeyPatch, dtype: torch.dtype, level: str
) -> Iterator[tuple[Options, Call]]:
    """Small chunks and large ones, raised rows, rows off their boundaries, rows that are not computed, long loops."""
    large = random_case(3, 4, 16, 6001, dtype, spread=3.0, ignored=0.0)
    large.targets[1] = 6000
    odd = random_case(1, 13, 9, 50, dtype, bias=dtype, softcap=5.0)
    odd.hidden, odd.weight, odd.bias = shifted(odd.hidden), shifted(odd.weight), shifted(odd.bias)
    strayed = random_case(7, 300, 16, 61, dtype, ignored=0.5)
    strayed.targets[[31, 32, 299]] = torch.tensor([77, 78, -5])
    capped = raised_case(6, 8, 2701, dtype)
    capped.options |= {"softcap": 60.0, "temperature": 0.7}
    # Targets so far above all others that float32, and float64, have no exponentials for those.
    logits = torch.randn(6, 2701, generator=torch.Generator().manual_seed(0))
    logits[torch.arange(6), torch.arange(6) * 540] = torch.tensor([39.0, 80.0, 110.0, 600.0, 800.0, 3e4])
    sure = case_of_logits(logits, (torch.arange(6) * 540).tolist(), dtype)
    sure.hidden, sure.weight = (torch.nn.functional.pad(x, (0, 2)) for x in (sure.hidden, sure.weight))
    few = {"num_scored": -1, "retained_rows": 7, "extras": OP_OUTPUTS}
    calls = [
        ("16,24", random_case(0, 40, 16, 61, dtype, spread=4.0), few),
        ("16,192", raised_case(6, 8, 400, dtype), few | {"retained_rows": 3}),
        ("16,192", raised_case(6, 8, 397, dtype), few | {"retained_rows": 3}),
        ("16,2720", raised_case(6, 8, 2701, dtype), few | {"retained_rows": 3}),
        ("16,2720", sure, few | {"retained_rows": 3}),
        ("16,2720", capped, few | {"retained_rows": 3}),
        ("", large, few | {"retained_rows": 2}),
        ("16,24", odd, few),
        ("16,24", random_case(4, 5, 1500, 30, dtype, ignored=0.2), few | {"num_scored": None}),
        ("512,24", random_case(2, 600, 8, 24, dtype, ignored=0.4), few | {"retained_rows": 0}),
        # Loops over more columns and hidden units than a block has threads, four times over.
        ("16,1344", raised_case(12, 1104, 2704, dtype), few | {"retained_rows": 12}),
        ("16,1344", raised_case(12, 1104, 2704, dtype), few | {"retained_rows": 0}),
        ("16,1344", random_case(6, 9, 1104, 1504, dtype, ignored=0.5), few | {"retained_rows": 2, "capturing": True}),
        ("16,1344", random_case(6, 9, 16, 1504, dtype, ignored=0.5), few | {"retained_rows": 9, "capturing": True}),
        ("16,192", random_case(6, 9, 16, 160, dtype, ignored=0.5), few | {"retained_rows": 2, "capturing": True}),
        ("16,1344", random_case(6, 9, 1109, 1501, dtype, ignored=0.5), few | {"retained_rows": 2, "capturing": True}),
        ("16,24", random_case(7, 40, 2400, 61, dtype, ignored=0.5), few | {"num_scored": 9}),
        ("16,24", random_case(8, 6, 9000, 30, dtype, ignored=0.3), few | {"num_scored": None}),
        ("16,24", random_case(9, 40, 16, 61, dtype, ignored=0.5), few | {"extras": (), "needs": ("weight",)}),
        ("16,24", random_case(9, 40, 16, 61, dtype, ignored=0.5), few | {"extras": (), "needs": (), "num_scored": 9}),
        ("16,24", strayed, few | {"message": "`targets`[31] is 77"}),
    ]
    if level == "1":  # more tiles than a block has threads, and what is largest in the last ones
        logits = torch.randn(2, 49500, generator=torch.Generator().manual_seed(1))
        logits[0, 49300], logits[1, 49170] = 9.0, 50.0
        many = case_of_logits(logits, [3, 49200], dtype)
        many.hidden, many.weight = (torch.nn.functional.pad(x, (0, 6)) for x in (many.hidden, many.weight))
        calls.append(("16,49536", many, few | {"retained_rows": 1}))
    for seed, (blocks, case, how) in enumerate(calls):

        def made(blocks: str = blocks, case: Case = case, how: dict[str, Any] = how) -> list[torch.Tensor]:
            patch.setenv("FASTDPO_CUDA_BLOCKS", blocks)
            patch.setenv("FASTDPO_CUDA_LEVEL", level)
            library.capture(how.get("capturing", False))
            plain = {name: value for name, value in how.items() if name not in ("capturing", "message")}
            if "message" in how:
                try:
                    call(library, case, **plain)
                except RuntimeError as error:
                    assert how["message"] in str(error)
                    return []
                raise AssertionError("a target outside the vocabulary was let pass")
            # Whatever an ignored row holds must not reach anything.
            computed = replace(case, grad_logps=case.grad_logps.masked_fill(~case.scored, torch.nan))
            if "capturing" in how:  # it is computed then
                computed.hidden = case.hidden.masked_fill(~case.scored[:, None], torch.nan)
            results = call(library, computed, **plain)
            assert all(library.written(t) for t in results.tensors())
            if how["num_scored"] in (-1, None):
                assert_cuda_matches(case, results)
            else:  # too few: what was left out is NaN
                left_out = case.scored & (case.scored.cumsum(0) > how["num_scored"])
                for values in (results.logps, *results.row_state, *results.extras.values(), *results.direction.T):
                    assert values.numel() == 0 or torch.equal(values.isnan(), left_out)
                assert not results.logps[~case.scored].any()
            return results.tensors()

        yield Options(random=seed % 2 == 1, seed=seed, most_instructions=ENDLESS), made
    library.capture(False)


def raised_case(rows: int, width: int, columns: int, dtype: torch.dtype) -> Case:
    """Rows whose exponent is raised, in the first chunk or a later one, by a logit anywhere in it."""
    generator = torch.Generator().manual_seed(rows)
    logits = torch.randn(rows, columns, generator=generator)
    # Three times the last one is a float16, too; e^-900 is less than float64 has, and not so small that nothing shows
    # where bits are wrong.
    rises = torch.tensor([39.0, 41.0, 80.0, 100.0, 300.0, 1e4]).repeat(rows // 6)
    # Several logits, so that sums of all kinds have more than one term; and higher ones in every third of the columns,
    # so that a row that was raised in one chunk is raised again in the next.
    for third in range(3):
        first = int(torch.randint(0, columns // 3 - 40, (), generator=generator)) + third * (columns // 3)
        logits[:, first : first + 40] += rises[:, None] * (1 + third)
    logits[:, ::7] += rises[:, None]
    logits[0, 0], logits[1, columns - 1] = 39.5, 41.5
    case = case_of_logits(logits, torch.randint(0, columns, (rows,), generator=generator).tolist(), dtype)
    case.hidden = torch.nn.functional.pad(case.hidden, (0, width - rows))
    case.weight = torch.nn.functional.pad(case.weight, (0, width - rows))
    # Something in the other columns, which meets zeros, so that directions are no zeros there.
    case.weight[:, rows:] = torch.randn(columns, width - rows, generator=generator).to(dtype)
    return case


def all_of_level0(machine: Machine, each: int, seed: int) -> list[Mutation]:
    return [
        mutation
        for part in KERNELS0
        for name, source in list(machine.sources.items())
        if part in name
        for mutation in mutations(source, LEVEL0, each, seed)
    ]


def judge_level0(
    library: Any, machine: Machine, patch: pytest.MonkeyPatch, edits: list[Mutation], digests: dict[Any, str]
) -> list[Verdict]:
    """``digests``: of the calls without an edit, by dtype and level, filled as they are needed."""
    verdicts = []
    for edit in edits:
        how = next(how for part, how in KERNELS0.items() if part in edit.kernel)
        if how not in digests:
            digests[how] = run(machine, level0_calls(library, patch, *how))
        verdicts.append(judge(machine, edit, level0_calls(library, patch, *how), digests[how], library.new_device))
    return verdicts


@pytest.fixture(scope="module")
def only_sm80(level0_library: Any, level0_kernels: Any, machine: Machine) -> Any:
    for compiled in level0_kernels.values():
        machine.add(compiled.ptx["80"].read_text())
    return level0_library


def report(verdicts: list[Verdict], survive: dict[str, str]) -> float:
    """Prints the share that is caught, which it returns, and of every survivor why.

    One that is harmless must change no byte, and of what is neither caught nor harmless there must be next to nothing.
    """
    survivors = [v for v in verdicts if not v.caught]
    why = {v: reason for v in survivors for part, reason in survive.items() if part in str(v.mutation)}
    harmless = [v for v in survivors if v in why]
    caught, tellable = len(verdicts) - len(survivors), len(verdicts) - len(harmless)
    print(
        f"\n{caught} of {len(verdicts)} edits caught ({caught / len(verdicts):.1%}), {len(harmless)} harmless: "
        f"{caught / tellable:.1%} of the others"
    )
    for v in survivors:
        print(f"{v}\n    {v.mutation.kernel[:100]}\n    {why.get(v, 'NOT EXPLAINED')}")
    assert caught >= ENOUGH * tellable
    assert all(v.same_bytes for v in harmless)
    # Another nvcc writes other PTX, whose places are others.
    if f"release {EXPLAINED_FOR}," in build.run([ops.nvcc(), "--version"]):
        assert all(v in why for v in survivors)
    return caught / len(verdicts)


def test_a_sample_of_level_0(only_sm80: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Edits of all kinds, and calls that pass without them, or they would catch anything."""
    sample = all_of_level0(machine, 1, seed=0)[::7]
    assert len(sample) >= 10
    report(judge_level0(only_sm80, machine, monkeypatch, sample, {}), HARMLESS0)


# Survivors that no run could tell from the kernel as it was, by what stands in their description.
AGAIN = "of the second visit of a raised row, which finds the same number as the first did, and that is still there"
HARMLESS0 = {
    "shared store dropped (5): st.shared.f32 [%r19], %f923": AGAIN,
    "shared store dropped (9): st.shared.f64 [%r52+32], %fd671": AGAIN,
    "shared store dropped (10): st.shared.f32 [%r530+16], %f160": "a second sum of logits: the first is kept",
    "guard dropped (6): @%p6 bra $L__BB2_129": "the loop asks again for each of the packs of a round",
    "guard dropped (48): @%p70 bra $L__BB1_89": "of a chunk without tiles, and each has one",
}


@pytest.mark.slow
def test_level_0(only_sm80: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    edits = all_of_level0(machine, 2, seed=1)
    assert len(edits) >= 60
    assert report(judge_level0(only_sm80, machine, monkeypatch, edits, {}), HARMLESS0) >= ENOUGH


# ------------------------------------------------------------------------------------------- Level 1

# Which call has which of the five kernels: needs and extras.
KERNELS1 = {
    "bf16_operand": (("hidden", "weight"), ()),
    "bf16_operand_extras": (("hidden", "weight"), OP_OUTPUTS),
}


def level1_calls(library: Any, patch: pytest.MonkeyPatch, kernel: str) -> Iterator[tuple[Options, Call]]:
    """More k-tiles than stages and several tiles for a cluster, with operations that take effect late, and at once."""
    needs, extras = KERNELS1[kernel]
    for rows, columns, depth, options in (
        (130, 200, 392, {"late": True}),
        (300, 401, 72, {"late": True, "random": True}),
        (300, 401, 392, {"random": True, "seed": 1}),
        (140, 600, 136, {"late": True, "random": True, "seed": 2}),
        *((130, 100, 72, {"late": True, "random": True, "uneven": seed > 5, "seed": seed}) for seed in range(3, 11)),
        # Two tiles of two k-tiles each, one for either warp group: both may be behind when the other block could leave.
        *((130, 300, 72, {"random": True, "uneven": True, "late": seed % 2 == 1, "seed": seed}) for seed in range(6)),
    ):
        case = random_case(0, rows, depth, columns, torch.bfloat16, ignored=0.02)

        def made(case: Any = case, rows: int = rows, columns: int = columns) -> list[torch.Tensor]:
            patch.setenv("FASTDPO_CUDA_BLOCKS", f"{rows},{-(-columns // 192) * 192}")
            patch.setenv("FASTDPO_CUDA_LEVEL", "1")
            library.pretend(90, 2)
            results = call(library, case, needs=needs, extras=extras)
            assert all(library.written(t) for t in results.tensors())
            assert_cuda_matches(case, results)
            return results.tensors()

        yield Options(**options, most_instructions=ENDLESS), made


UNUSED = "of the pipeline that would load a C (the barriers at 80 to 136), which this product has not"
HARMLESS1 = {
    "fence.mbarrier_init dropped (0)": "one of four in a row, by one thread; the last is for all",
    "fence.mbarrier_init dropped (1)": "as above",
    "mbarrier not initialised (14)": UNUSED,
    "mbarrier for one arrival more (15)": UNUSED,
    "arrival dropped (2): mbarrier.arrive.shared::cta": "lets the warp begin that would load a C",
    "TMA wait dropped (0)": "a tile's first: one group may be pending, and there is one",
    "TMA waits for one group less (0)": "as above",
    "the other way round (1): setp.ne.b32 p": "nvcc has the accumulators start from zeros",
    "wgmma.fence dropped (1)": "the main loop's second: nothing has touched the accumulators since the first",
}


@pytest.mark.slow
def test_level_1(level1: Any, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = []
    for kernel in KERNELS1:
        calls = functools.partial(level1_calls, level1, monkeypatch, kernel)
        machine.launched()
        as_it_was = run(machine, calls())
        # The forward's; the backward has another.
        product = next(name for name in machine.launched() if "cutlass13device_kernel" in name)
        for edit in mutations(machine.sources[product], LEVEL1, 2, seed=1):
            verdicts.append(judge(machine, edit, calls(), as_it_was, level1.new_device))
    report(verdicts, HARMLESS1)
