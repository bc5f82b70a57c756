"""Tests of the CUDA kernels themselves: what the front end would do about wrong ones is off."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def kernels_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDPO_SELF_CHECK", "off")
