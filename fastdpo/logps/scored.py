"""The rows that are scored, where the host picks them out before the ops see them, and puts the results back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdpo.logps.ops import OUTPUTS
from fastdpo.logps.targets import refuse_foreign_targets


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """S of N rows.

    Attributes:
        mask: [N] bool, which rows are scored.
        positions: [S] int64, where these are, in order.
    """

    mask: Tensor
    positions: Tensor

    @classmethod
    def find(cls, targets: Tensor, scalars: Mapping[str, Any], vocabulary: Tensor | int) -> ScoredRows:
        """From targets [N], entries of ``vocabulary``, and the ops' scalars.

        On CUDA the host waits for the device, unless it is told num_scored: then S is that, right or wrong, and
        :meth:`spread` marks the results.

        Raises:
            ValueError: num_scored is wrong.
            IndexError: a target outside the vocabulary.
            RuntimeError: num_scored is not given in a graph that is being captured.
        """
        ignore_index, num_scored = scalars["ignore_index"], scalars["num_scored"]
        mask = targets != ignore_index
        if targets.is_cuda and num_scored >= 0:
            return cls(mask, torch.nonzero_static(mask, size=num_scored, fill_value=0).squeeze(1))
        if targets.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("num_scored is None; give it, for in a captured graph targets cannot be counted")
        positions = mask.nonzero().squeeze(1)
        if num_scored not in (-1, len(positions)):
            raise ValueError(
                f"num_scored is {num_scored}; targets has {len(positions)} that are not ignore_index ({ignore_index})"
            )
        refuse_foreign_targets(targets, mask, vocabulary, ignore_index)
        return cls(mask, positions)

    def pick(self, values: Tensor) -> Tensor:
        """[N, ...] to [S, ...]; values themselves where every row is scored."""
        return values if len(self.positions) == len(values) else values.index_select(0, self.positions)

    def spread(self, logps: Tensor, outputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """As ``differentiable_logps``: [S] to [N], 0 where ignored; [0] for each of OUTPUTS that is not there."""
        miscounted = self.mask & (self.mask.sum() != len(self.positions))

        def spread(values: Tensor) -> Tensor:
            result = values.new_zeros(self.mask.shape).index_copy(0, self.positions, values)
            return result.masked_fill(miscounted, torch.nan)

        empty = logps.new_empty(0)
        return spread(logps), *(spread(outputs[name]) if name in outputs else empty for name in OUTPUTS)
