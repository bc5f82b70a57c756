"""What a compiled graph leaves out."""

from __future__ import annotations

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

    x = torch.arange(4.0)
    assert torch.equal(torch.compile(entry, backend="eager")(x), 3 * (2 * x + 1))
    assert traced == [False]
    compiled = torch.compile(entry, backend="eager")
    compiled(x)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(x)  # nothing around the call is another graph the next time
    with pytest.raises(torch._dynamo.exc.Unsupported, match="for a reason"):
        torch.compile(lambda x: left_out(x), backend="eager", fullgraph=True)(x)
