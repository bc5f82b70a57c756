"""What is compiled for, from the toolkit and what the environment asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from building import toolkit

ALL = ("8.0", "8.6", "8.9", "9.0a", "10.0", "12.0")


@pytest.fixture(autouse=True)
def _said_again() -> None:
    toolkit.cuda_archs.cache_clear()


def archs(version: str) -> tuple[str, ...]:
    return toolkit.cuda_archs(toolkit.Toolkit("nvcc", version, Path("/toolkit")))


@pytest.mark.parametrize(("version", "found"), [("13.0", ALL), ("12.8", ALL), ("12.6", ALL[:4]), ("12.0", ALL[:4])])
def test_a_toolkit_compiles_for_what_it_knows(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
    version: str,
    found: tuple[str, ...],
) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    assert archs(version) == found
    said = capfd.readouterr().out
    assert ("10.0, 12.0 (with CUDA" in said) == (found != ALL)


@pytest.mark.parametrize(
    ("asked", "found", "left_out"),
    [
        ("", ALL, None),
        ("9.0", ("9.0a",), None),
        ("9.0a+PTX 8.0", ("8.0", "9.0a"), None),
        ("7.5 8.0 8.6 9.0 10.0 12.0+PTX", ("8.0", "8.6", "9.0a", "10.0", "12.0"), "7.5"),
        ("8.7;8.9, 10.3", ("8.9",), "8.7, 10.3"),
    ],
)
def test_the_environment_cuts_the_list(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
    asked: str,
    found: tuple[str, ...],
    left_out: str | None,
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert archs("13.0") == found
    said = capfd.readouterr().out
    assert said == (
        "" if left_out is None else f"fastdpo: no kernels for compute capability {left_out} (with CUDA 13.0)\n"
    )


@pytest.mark.parametrize(("asked", "version"), [("7.5", "13.0"), ("12.0", "12.6"), ("8.0", "11.8")])
def test_where_nothing_is_left(monkeypatch: pytest.MonkeyPatch, asked: str, version: str) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    with pytest.raises(
        SystemExit, match=f"TORCH_CUDA_ARCH_LIST is '{asked}' and the toolkit CUDA {version}, which leaves"
    ):
        archs(version)
