"""How the CUDA ops cut their work into token blocks and vocabulary chunks. The results do not depend on it: see
test_cuda_host.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from cuda_host.build import build
from hypothesis import given
from hypothesis import strategies as st
from op_calls import assert_matches, call, random_case

VARIABLE = "FASTDPO_CUDA_BLOCKS"
WORKSPACE = 128 << 20
SUMS, DIRECTION, WEIGHT = range(3)
# Level 1's tiles have 16 columns in the host's build.
MULTIPLE = {0: 128, 1: 16}
LEAST_ROWS = 512


class Sizes(NamedTuple):
    rows: int
    vocabulary: int
    hidden_units: int
    multiprocessors: int = 132


class Scratch(NamedTuple):
    """Bytes of a row whatever the chunk, of an entry, and of a column whatever the block."""

    row: int
    entry: int
    column: int


OF_BFLOAT16 = Scratch(0, 6, 0)


@pytest.fixture(scope="module")
def ops(request: pytest.FixtureRequest) -> Any:
    torch.ops.load_library(str(build(request.config.cache.mkdir("cuda_host"))))
    return torch.ops.fastdpo_host


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(VARIABLE, raising=False)
    yield


def choose(ops: Any, sizes: Sizes, how: int, level: int = 0, scratch: Scratch = OF_BFLOAT16) -> tuple[int, int]:
    return ops.choose_blocks(how, level, *sizes, *scratch)


@pytest.fixture(scope="module")
def chosen(ops: Any) -> Any:
    """For hypothesis, which wants nothing that is made anew for every test."""
    return lambda *case: choose(ops, *case)


@given(
    sizes=st.builds(
        Sizes,
        st.integers(1, 200_000),
        st.integers(1, 300_000),
        st.integers(1, 20_000),
        st.sampled_from([1, 24, 82, 108, 132, 148]),
    ),
    how=st.sampled_from([SUMS, DIRECTION, WEIGHT]),
    level=st.sampled_from([0, 1]),
    scratch=st.builds(Scratch, st.sampled_from([0, 50_000]), st.sampled_from([0, 4, 6, 12]), st.integers(0, 100_000)),
)
def test_fits_the_sizes_and_the_memory(chosen: Any, sizes: Sizes, how: int, level: int, scratch: Scratch) -> None:
    rows, columns = chosen(sizes, how, level, scratch)
    assert 1 <= rows <= sizes.rows
    assert columns >= 1 and columns % MULTIPLE[level] == 0 and columns < sizes.vocabulary + MULTIPLE[level]
    assert rows * scratch.row <= WORKSPACE or rows <= LEAST_ROWS
    assert columns * (rows * scratch.entry + scratch.column) <= WORKSPACE or columns == MULTIPLE[level]
    assert chosen(sizes, how, level, scratch) == (rows, columns)


@pytest.mark.parametrize("how", [SUMS, DIRECTION, WEIGHT])
def test_small_work_is_not_cut(ops: Any, how: int) -> None:
    assert choose(ops, Sizes(300, 32_000, 512), how) == (300, 32_000)


def tiles(total: int, size: int) -> int:
    return -(-total // size)


def fullness(rows: int, columns: int, multiprocessors: int) -> float:
    """How much of the multiprocessors' time the logits' tiles need, in the better of two orientations."""
    counts = [tiles(rows, 128) * tiles(columns, 256), tiles(rows, 256) * tiles(columns, 128)]
    return max(count / (multiprocessors * tiles(count, multiprocessors)) for count in counts)


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(8_192, 128_256, 4_096),
        Sizes(8_192, 151_936, 896),
        Sizes(65_536, 128_256, 4_096),
        Sizes(8_192, 128_256, 4_096, multiprocessors=108),
    ],
)
@pytest.mark.parametrize("how", [SUMS, DIRECTION, WEIGHT])
def test_tiles_of_the_logits_fill_the_waves(ops: Any, sizes: Sizes, how: int) -> None:
    assert fullness(*choose(ops, sizes, how), sizes.multiprocessors) > 0.93


def test_the_widest_chunk_would_not_fill_them() -> None:
    """Which is why it is not simply taken: equal chunks of Llama's vocabulary within the memory, on an H100."""
    assert fullness(2_048, 10_752, 132) < 0.86


@pytest.mark.parametrize("hidden_units", [512, 896])
def test_narrow_hidden_states_get_long_blocks(ops: Any, hidden_units: int) -> None:
    """Their direction has few columns: a short block's product would be of too few tiles for all multiprocessors."""
    narrow, _ = choose(ops, Sizes(8_192, 151_936, hidden_units), DIRECTION)
    wide, _ = choose(ops, Sizes(8_192, 151_936, 4_096), DIRECTION)
    assert narrow > wide


def test_the_rows_of_a_block_have_a_budget_too(ops: Any) -> None:
    sizes = Sizes(1 << 20, 128_256, 4_096)
    rows, _ = choose(ops, sizes, SUMS, 1, Scratch(6 * sizes.hidden_units, 0, 0))
    assert rows * 6 * sizes.hidden_units <= WORKSPACE


# ------------------------------------------------------------------------------------------- what is asked for


@pytest.mark.parametrize(("asked", "products"), [("16,48", 3 * 3), ("40,1000", 1), ("100000,16", 8), ("20,129", 2)])
def test_blocks_that_are_asked_for(monkeypatch: pytest.MonkeyPatch, ops: Any, asked: str, products: int) -> None:
    """Level 1 counts its products: one for every block and chunk."""
    monkeypatch.setenv(VARIABLE, asked)
    monkeypatch.setenv("FASTDPO_CUDA_LEVEL", "1")
    case = random_case(0, 40, 16, 128, torch.bfloat16, ignored=0.0)
    ops.fused_products()
    results = call(ops, case, needs=(), extras=())
    assert ops.fused_products() == products
    assert_matches(case, results)


@pytest.mark.parametrize("asked", ["16", "16,", ",16", "16,x", "0,16", "16,-8", "16,8,8", "16, 8", "1e3,8"])
def test_blocks_that_are_not_two_numbers(monkeypatch: pytest.MonkeyPatch, ops: Any, asked: str) -> None:
    monkeypatch.setenv(VARIABLE, asked)
    with pytest.raises(RuntimeError, match=f"FASTDPO_CUDA_BLOCKS is '{asked}', but must be two positive numbers"):
        call(ops, random_case(0, 20, 16, 40, torch.bfloat16))


def test_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch, ops: Any) -> None:
    monkeypatch.setenv(VARIABLE, "")
    case = random_case(0, 20, 16, 40, torch.bfloat16)
    assert_matches(case, call(ops, case))
