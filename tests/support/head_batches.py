"""Batches for a model with the fused head, and what its ordinary logits make of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdpo.model.head import FusedHead

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
EPS = {dtype: torch.finfo(dtype).eps for dtype in (torch.float32, torch.float64)}


def make_batch(vocab_size: int = 384, *, rows: int = 4, length: int = 14, seed: int = 0) -> dict[str, Tensor]:
    """Rows padded on the right, with prompts of different lengths that are not scored."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, vocab_size, (rows, length), generator=generator)
    prompt = torch.randint(2, 6, (rows, 1), generator=generator)
    end = torch.randint(9, length + 1, (rows, 1), generator=generator)
    position = torch.arange(length)[None]
    inside = position < end
    return {
        "input_ids": input_ids.masked_fill(~inside, 0),
        "attention_mask": inside.long(),
        "labels": input_ids.masked_fill(~inside | (position < prompt), -100),
    }


def from_logits(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the head should say, from the model's ordinary logits."""
    z = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    mask = targets != -100
    log_p = z.log_softmax(-1)
    index = targets.where(mask, 0)[..., None]
    return {
        "mask": mask,
        "logps": log_p.gather(-1, index)[..., 0] * mask,
        "entropy": -(log_p.exp() * log_p).sum(-1) * mask,
        "log_sum_sq_probs": (2 * log_p).logsumexp(-1) * mask,
        "mean_logits": z.mean(-1) * mask,
        "is_top1": (z.argmax(-1) == targets) & mask,
    }


def gradients(model: nn.Module, logps: Tensor) -> dict[str, Tensor]:
    """Of a weighted sum, so that every token counts differently."""
    model.zero_grad()
    weights = torch.linspace(-1, 1, logps.numel(), dtype=logps.dtype).view_as(logps)
    (logps * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float) -> None:
    assert got.keys() == expected.keys()
    # A parameter without influence (a key's bias, under softmax) has a gradient of rounding errors alone.
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= rtol * gradient.norm() + EPS[torch.float32] * largest, name


def assert_agrees(
    model: nn.Module, batch: dict[str, Tensor], *, root: nn.Module | None = None, dtype: torch.dtype = torch.float32
) -> None:
    """The fused head's results and gradients are those of the model's ordinary logits."""
    expected = from_logits(model, batch)
    expected_gradients = gradients(model, expected["logps"])
    head = FusedHead(model)
    got = head(root or model, **batch, outputs=OUTPUTS)
    got_gradients = gradients(model, got.logps)
    assert got.logps.dtype == dtype
    assert got.model_output.logits is None
    # Log-probabilities of some 10, through a few hundred terms in either order.
    tolerance = 100 * EPS[dtype]
    for name in ("mask", "is_top1"):
        assert torch.equal(getattr(got, name), expected[name]), name
    for name in ("logps", "entropy", "log_sum_sq_probs", "mean_logits"):
        torch.testing.assert_close(
            getattr(got, name),
            expected[name].detach() if name != "logps" else expected[name],
            rtol=tolerance,
            atol=tolerance,
            msg=name,
        )
    assert_same_gradients(got_gradients, expected_gradients, rtol=1000 * EPS[dtype])
