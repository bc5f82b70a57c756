"""Frequencies that follow the longest row so far are held still for a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import make_family

from fastdpo.model.rotary import fix_frequencies

pytestmark = pytest.mark.usefixtures("one_thread")

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES: dict[str, dict[str, Any]] = {
    "llama": {"rope_parameters": DYNAMIC, "max_position_embeddings": 16},
    "phi3": {"rope_parameters": LONG, "original_max_position_embeddings": 16, "max_position_embeddings": 64},
    # Each kind of layer has its own.
    "gemma3_text": {
        "rope_parameters": {
            "full_attention": DYNAMIC,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        "max_position_embeddings": 16,
    },
}


@pytest.mark.parametrize("model_type", CASES)
def test_rows_do_not_depend_on_longer_ones(model_type):
    short, long = torch.arange(12)[None], torch.arange(40)[None]

    def logits(model, ids):
        with torch.no_grad():
            return model(ids, use_cache=False).logits

    model = make_family(model_type, trained=True, **CASES[model_type])
    alone = logits(model, short)
    together = logits(model, torch.cat([torch.cat([short, short.new_zeros(1, 28)], 1), long]))
    assert not torch.allclose(together[:1, :12], alone, atol=1e-3)  # what is to be mended
    longest = logits(model, long)

    model = make_family(model_type, trained=True, **CASES[model_type])
    words = fix_frequencies(model, 40)
    assert "are held at those of sequences of 40 tokens" in words
    alone = logits(model, short)
    torch.testing.assert_close(logits(model, long), longest)  # those of a row that is as long
    assert torch.equal(logits(model, short), alone)
    together = logits(model, torch.cat([torch.cat([short, short.new_zeros(1, 28)], 1), long]))
    torch.testing.assert_close(together[:1, :12], alone, atol=1e-4, rtol=1e-4)
    assert "default" not in str(model.config.rope_parameters.get("rope_type", ""))  # the configuration is as it was


@pytest.mark.parametrize("model_type", CASES)
def test_short_rows_need_nothing_and_unlimited_ones_are_refused(model_type):
    model = make_family(model_type, **CASES[model_type])
    assert fix_frequencies(model, 16) is None
    with pytest.raises(NotImplementedError, match=rf"'{model_type}'\) follow the longest row .* give max_length"):
        fix_frequencies(model, None)


def test_other_models_need_nothing():
    assert fix_frequencies(make_family("llama"), None) is None
    assert fix_frequencies(make_family("bloom"), None) is None
