"""The sweep over the CUDA ops' cuts, on the host's build of them: every cut has its turn. Nothing looks at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import cuda_blocks
import pytest
import torch
from cuda_blocks import CHOSEN, Cut, cuts_of, make_problem, sweep, table
from cuda_host.build import build
from rich.console import Console


@pytest.fixture(scope="module")
def ops(request: pytest.FixtureRequest) -> Any:
    torch.ops.load_library(str(build(request.config.cache.mkdir("cuda_host"))))
    return torch.ops.fastdpo_host


def test_cuts_fill_the_memory_that_they_may() -> None:
    cuts = cuts_of(8_192, 128_256)
    assert cuts[0] == CHOSEN and len(set(cuts)) == len(cuts)
    assert {cut.rows for cut in cuts[1:]} == {512, 1_024, 2_048, 4_096, 8_192}
    for cut in cuts[1:]:
        assert cut.columns % 128 == 0
        mib = cut.rows * cut.columns * 6 / 2**20
        assert any(0.9 * most < mib <= most for most in (32, 64, 128, 256))


def test_cuts_of_little_work() -> None:
    assert cuts_of(100, 1_024) == [CHOSEN, Cut(100, 1_024)]


def test_every_cut_has_its_turn_in_every_round(ops: Any) -> None:
    problem = make_problem(24, 16, 96, "cpu")
    cuts = [CHOSEN, Cut(8, 48), Cut(24, 96)]
    seen: list[str] = []
    results: list[Any] = []

    def clock(work: Callable[[], Any]) -> float:
        seen.append(os.environ["FASTDPO_CUDA_BLOCKS"])
        results.append(work())
        return float(len(seen))

    before = os.environ.get("FASTDPO_CUDA_BLOCKS")
    lines = sweep(ops, problem, cuts, 2, clock)
    assert os.environ.get("FASTDPO_CUDA_BLOCKS") == before
    assert [line["pass"] for line in lines] == ["sums", "direction", "weight"]
    assert seen == ["", "", "8,48", "24,96"] * 9  # the floor, the chosen cut, the others; three turns of three passes
    # The second pass begins with call 13; its turns after the one that warms up are calls 17 to 24.
    assert lines[1]["floor_seconds"] == (17 + 21) / 2
    assert [cut["seconds"] for cut in lines[1]["cuts"]] == [(18 + 22) / 2, (19 + 23) / 2, (20 + 24) / 2]

    # Products of the shapes of what the ops return, and the same values whatever the cut.
    assert [results[i].shape for i in (0, 12, 24)] == [(24, 96), (24, 16), (96, 16)]
    for first in (0, 12, 24):
        chosen, *others = results[first + 1 : first + 4]
        for other in others:
            for expected, found in zip(chosen, other, strict=True):
                torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-5)
    logps, _, direction, *_ = results[13]
    expected = (problem.hidden.float() @ problem.weight.float().T).log_softmax(1)
    torch.testing.assert_close(logps, expected.gather(1, problem.targets[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    assert direction.shape == (24, 16)

    console = Console(width=100, record=True, quiet=False)
    console.print(table("a title", lines))
    text = console.export_text()
    assert "a title" in text and "as chosen" in text and "8: 48" in text and text.count("*") == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--case", "gpt"], "--case names 'gpt'; it may name tiny"),
        (["--tokens", "0"], "--tokens is 0; it should be at least 1"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--level", "2"], "invalid choice"),
    ],
)
def test_flags_that_do_not_fit(capsys: pytest.CaptureFixture[str], flags: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        cuda_blocks.parse_arguments(flags)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cuda_blocks.parse_arguments([])
    assert "there is no CUDA device" in capsys.readouterr().err
