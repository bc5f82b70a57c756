"""Makes the wheel: `make wheel`. One file for every Python, with a CPU library for each torch of torch_tree.RELEASES.

auditwheel gives it its tag, by the versions of glibc's and libstdc++'s symbols that are really asked for. torch's own
libraries are named and not brought along: they are the running torch's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from building import torch_tree
from building.contents import local_paths, members
from building.ninja import ROOT
from building.toolkit import find_toolkit

TORCHS_OWN = ("libtorch_cpu.so", "libtorch_cuda.so", "libc10.so")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m building.wheel", description=__doc__)
    parser.add_argument("--torches", default=",".join(torch_tree.RELEASES), help="releases of torch, with commas")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder for the wheel")
    args = parser.parse_args()
    toolkit = find_toolkit()
    if toolkit is None:
        sys.exit("fastdpo: there is no nvcc (CUDA_HOME, PATH): the wheel would have no CUDA library")
    folder = ROOT / "build/wheel"
    shutil.rmtree(folder, ignore_errors=True)  # whatever lies in there comes into the wheel
    # Not through pip, which would keep what is said meanwhile to itself; setuptools warns of that.
    command = [sys.executable, "-W", "ignore", "setup.py", "-q", "build", f"--build-base={folder}", "bdist_wheel"]
    environment = os.environ | {torch_tree.RELEASES_WANTED: args.torches}
    subprocess.run([*command, f"--dist-dir={folder}"], cwd=ROOT, env=environment, check=True)
    (made,) = folder.glob("*.whl")
    wheel = repaired(made, args.out)
    # The names of the machine's folders, in the forms in which they could have come in.
    folders = [ROOT, ROOT.resolve(), Path(sys.prefix), Path(sys.base_prefix), toolkit.home, Path.home() / "."]
    for name, data in members(wheel):
        if found := local_paths(data, folders) if name.endswith((".so", "RECORD", "WHEEL", ".json")) else []:
            sys.exit(f"fastdpo: {name} of {wheel.name} names files of this machine: {found[0]}")
    print(f"fastdpo: {wheel} ({wheel.stat().st_size / 1e6:.1f} MB)")


def repaired(wheel: Path, out: Path) -> Path:
    """With the tag that auditwheel finds it to deserve, in ``out``."""
    exclude = [f"--exclude={name}" for name in TORCHS_OWN]
    with tempfile.TemporaryDirectory() as folder:
        auditwheel = [sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", folder, *exclude, str(wheel)]
        subprocess.run(auditwheel, check=True)
        (tagged,) = Path(folder).glob("*.whl")
        out.mkdir(parents=True, exist_ok=True)
        return Path(shutil.move(tagged, out / tagged.name))


if __name__ == "__main__":
    main()
