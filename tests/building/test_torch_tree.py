"""The releases of torch that there are libraries for, and where their headers come from."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from building import torch_tree
from building.ninja import ROOT


def test_the_running_torch_lends_its_own_headers(tmp_path: Path) -> None:
    tree = torch_tree.of_release(torch.__version__.split("+")[0], tmp_path)
    assert tree == torch_tree.running() and not list(tmp_path.iterdir())
    assert all(path.is_dir() for path in tree.includes) and tree.version == torch.__version__


def test_another_release_is_fetched_once_and_only_its_headers_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def download(command: list[str], check: bool) -> None:
        asked.append(command[-1])
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "torch.whl", "w") as wheel:
            wheel.writestr("torch/include/torch/version.h", "1.2.3")
            wheel.writestr("torch/lib/libtorch_cpu.so", "gigabytes")

    monkeypatch.setattr(torch_tree.subprocess, "run", download)
    for _ in range(2):
        tree = torch_tree.of_release("1.2.3", tmp_path)
        assert (tree.includes[0] / "torch/version.h").read_text() == "1.2.3" and tree.minor == "1.2"
    assert asked == ["torch==1.2.3"]
    files = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert files == ["torch-1.2.3/torch/include/torch/version.h"]


@pytest.mark.parametrize("page", ["README.md", "docs/install.md", "CHANGELOG.md"])
def test_the_pages_name_the_releases(page: str) -> None:
    first, last = (".".join(release.split(".")[:2]) for release in (torch_tree.RELEASES[0], torch_tree.RELEASES[-1]))
    text = (ROOT / page).read_text()
    named = (
        f"torch {first}–{last}" in text or f"torch {first} to {last}" in text or f"fastdpo_cpu_torch{first}.so" in text
    )
    assert named and last in text
