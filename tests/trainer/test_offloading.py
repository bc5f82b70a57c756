"""Activations offloaded in training: the same run, or refused before anything is trained."""

from __future__ import annotations

from pathlib import Path

import pytest
from broken_runs import differences, id_rows, run
from tiny_models import make_model

pytestmark = pytest.mark.usefixtures("one_thread", "quiet_and_uncached")

ROWS = id_rows(8, 384)


def test_a_run_on_a_cpu_is_told_that_there_is_nowhere_to_move_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="^activation_offloading is on.*this run computes in the host's memory"):
        run(tmp_path, lambda: make_model("llama"), ROWS, activation_offloading=True)


@pytest.mark.parametrize("packing", ["shared", "padded"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_changes_no_bit_of_a_run(
    checkpointing: bool, packing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastdpo.trainer.setup.check_offloading", lambda *_, **__: None)
    options = {"packing": packing, "gradient_checkpointing": checkpointing, "max_tokens_per_batch": 24}
    expected = run(tmp_path / "kept", lambda: make_model("llama"), ROWS, save_strategy="no", **options)
    options |= {"activation_offloading": True}
    got = run(tmp_path / "moved", lambda: make_model("llama"), ROWS, save_strategy="no", **options)
    assert got._offloading is not None and expected._offloading is None
    assert differences(got, expected) == []
