"""A torch to compile against: the running one's headers, or another release's, fetched from the package index."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

# The releases that the wheel has a CPU library for. A library serves all patch releases, which keep the headers.
RELEASES = ("2.11.0", "2.12.0", "2.13.0", "2.14.0")
# Where building/wheel.py tells setup.py of them, with commas: setuptools forgets a command's options on its way.
RELEASES_WANTED = "FASTDPO_WHEEL_TORCHES"


class TorchTree(NamedTuple):
    """A torch's headers."""

    version: str  # in full, such as 2.13.0+cpu
    includes: tuple[Path, ...]
    cxx11_abi: bool

    @property
    def minor(self) -> str:
        """Such as 2.13."""
        return re.match(r"\d+\.\d+", self.version).group()


def running() -> TorchTree:
    import torch
    from torch.utils.cpp_extension import include_paths

    return TorchTree(torch.__version__, tuple(map(Path, include_paths())), torch._C._GLIBCXX_USE_CXX11_ABI)


def of_release(release: str, folder: Path) -> TorchTree:
    """A release's headers: the running torch's if it is that one, for whatever device (they are the same); or those of
    its wheel for this Python, which is not installed. They are kept in ``folder``."""
    if (torch := running()).version.split("+")[0] == release:
        return torch
    headers = folder / f"torch-{release}" / "torch/include"
    if not headers.is_dir():
        print(f"fastdpo: fetching torch {release} for its headers", flush=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            subprocess.run([*command, "--dest", scratch, f"torch=={release}"], check=True)
            (wheel,) = Path(scratch).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                members = [name for name in archive.namelist() if name.startswith("torch/include/")]
                archive.extractall(Path(scratch) / "unpacked", members)
            # All or nothing: what a broken download left is not taken for headers.
            headers.parents[1].mkdir(exist_ok=True)
            shutil.move(Path(scratch) / "unpacked/torch", headers.parent)
    # Since 2.7 torch's wheels for Linux have the newer ABI of the C++ library alone.
    return TorchTree(release, (headers, headers / "torch/csrc/api/include"), cxx11_abi=True)
