"""What a model does to its logits is found out for every scale, softcap and size of a vocabulary."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdpo.model.logit_transform import LogitTransform, fit_transform, probes

CPU = torch.device("cpu")


@given(
    scale=st.floats(1e-3, 10),
    softcap=st.none() | st.floats(10, 1000),
    vocab_size=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_scale_and_softcap_are_found_again(scale, softcap, vocab_size, dtype):
    sent = probes(vocab_size, dtype, CPU)
    z = scale * sent
    found = fit_transform(sent, z if softcap is None else softcap * torch.tanh(z / softcap), "a model")
    assert sent.shape[1] == vocab_size
    # Of the slope at 2^-12, tanh's own curve included; the level of saturation is one rounding away.
    assert found.scale == pytest.approx(scale, rel=2e-5)
    assert found.softcap == (softcap if softcap is None else pytest.approx(softcap, rel=torch.finfo(dtype).eps))
    assert found.apply(0.5) == pytest.approx(LogitTransform(scale, softcap).apply(0.5), rel=1e-4)


@pytest.mark.parametrize("change", [torch.exp, torch.neg, lambda z: z * torch.nan, lambda z: z.clamp(max=50)])
def test_what_is_neither_is_refused(change):
    sent = probes(32, torch.float32, CPU)
    with pytest.raises(NotImplementedError, match="what a model does to its logits .* is not a positive scale"):
        fit_transform(sent, change(sent), "a model")
