"""What a compiled graph leaves out."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fastdpo.logps.graphs import outside_of_graphs


def test_a_call_is_left_to_eager_mode() -> None:
    traced = []

    @outside_of_graphs("for a reason")
    def left_out(x: Tensor) -> Tensor:
        traced.append(torch.compiler.is_compiling())
        return x + 1

    def entry(x: Tensor) -> Tensor:
        return left_out(2 * x) * 3

    compiled = torch.compile(entry, backend="eager")
    for size in (4, 5, 4):
        x = torch.arange(float(size))
        assert torch.equal(compiled(x), 3 * (2 * x + 1))
    assert traced == [False] * 3
    with pytest.raises(torch._dynamo.exc.Unsupported, match="for a reason"):
        torch.compile(lambda x: left_out(x), backend="eager", fullgraph=True)(x)


def test_the_compiler_is_not_loaded_for_it() -> None:
    """It takes as long as torch itself."""
    code = """
import sys, torch, fastdpo
from fastdpo.logps import low_rank, vocab_parallel
from fastdpo.logps.graphs import outside_of_graphs

@outside_of_graphs("for a reason")
def left_out(x):
    return x + 1

fastdpo.token_logps(torch.ones(1, 2, 8), torch.ones(16, 8), torch.tensor([[1, 2]]))
print(left_out(1), left_out.__name__, "torch._dynamo" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["2", "left_out", "False"]
