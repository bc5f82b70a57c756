"""What a model does to its logits after its output embedding, told by a few values that are sent through it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Sent through what follows the output embedding, to learn what it does: the first gives the slope at 0, the second
# the level at which it saturates, and all of them must agree with a scale and a softcap.
_PROBES = (2.0**-12, 2.0**40, 0.5, -0.5, 4.0, -4.0, 60.0, -60.0)
_TOLERANCE = 1e-5  # float32, through at most a division, a tanh and a product


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What the model does to its logits after the output embedding: softcap * tanh(scale * z / softcap)."""

    scale: float
    softcap: float | None

    def apply(self, logit: float) -> float:
        """What becomes of a logit."""
        z = logit * self.scale
        return z if self.softcap is None else self.softcap * math.tanh(z / self.softcap)


def probes(vocab_size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Logits [P, vocab_size] to send through; P is 1 unless there are fewer entries than probes."""
    positions = math.ceil(len(_PROBES) / vocab_size)
    index = torch.arange(positions * vocab_size, device=device) % len(_PROBES)
    return torch.tensor(_PROBES, dtype=dtype, device=device)[index].view(positions, vocab_size)


def fit_transform(sent: Tensor, received: Tensor, name: str) -> LogitTransform:
    """The transform that makes ``received`` of ``sent``.

    Args:
        sent: from :func:`probes`.
        received: what became of them, of the same number of elements.
        name: the model's, for messages.

    Raises:
        NotImplementedError: it is not a positive scale and a softcap, the same for every vocabulary entry.
    """
    sent, received = sent.flatten(), received.flatten()
    if sent.shape != received.shape:
        raise NotImplementedError(
            f"{name} turns its {sent.numel()} logits into {received.numel()}, which is not supported"
        )
    by_probe = [received[i :: len(_PROBES)].double() for i in range(len(_PROBES))]
    measured = [values[0].item() for values in by_probe]
    same_everywhere = all(bool((values == values[0]).all()) for values in by_probe)
    scale = measured[0] / _PROBES[0]
    if abs(scale - 1) < _TOLERANCE:
        scale = 1.0  # a softcap alone leaves rounding errors
    saturated = abs(measured[1] - scale * _PROBES[1]) > _TOLERANCE * scale * _PROBES[1]
    transform = LogitTransform(scale, measured[1] if saturated else None)
    expected = [transform.apply(x) for x in _PROBES]
    # Written so that NaN does not fit.
    fits = all(abs(m - e) <= _TOLERANCE * abs(e) for m, e in zip(measured, expected, strict=True))
    if not (same_everywhere and fits and scale > 0):
        if same_everywhere:
            found = ", ".join(f"{x:g} becomes {m:g}" for x, m in zip(_PROBES, measured, strict=True))
        else:
            found = "the same value becomes different ones at different vocabulary entries"
        raise NotImplementedError(
            f"what {name} does to its logits after the output embedding is not a positive scale, nor a softcap "
            f"(softcap * tanh(scale * logit / softcap)), nor both: {found}. It is not supported"
        )
    return transform
