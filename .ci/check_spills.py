"""Reads what ptxas said of every CUDA kernel when the library was built, and fails where one has a register in memory.

Level 1's kernels are among them where CUTLASS was there, and are looked at as machine code, too
(tests/cuda/test_library.py).
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
LOGS = ROOT / "build/native/cuda"  # a log beside each object, as old as that (building/libraries.py)
# What must have been built. Spills for other architectures are told, too, and let pass: on the newest ones only what
# stands beside Level 1's product spills, and that runs on sm_90a alone.
REFUSED = ("sm_80", "sm_86", "sm_89", "sm_90a")
# What is said of one kernel; nvcc keeps together what it says of an architecture.
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'\n"
    r".*Function properties for (?P=name)\n"
    r" *\d+ bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers"
)


def kernels_of(log: Path) -> list[re.Match[str]]:
    if not log.is_file():
        sys.exit(f"{log} is not there: build the library, where nvcc is (`make venv`)")
    text = log.read_text()
    found = list(KERNEL.finditer(text))
    if not found or len(found) != text.count("Compiling entry function"):
        sys.exit(f"{log} is not written as this script knows it")
    return found


def main() -> int:
    kernels, spilling = Counter[str](), Counter[str]()
    own = {LOGS / f"{source.stem}_cu.o.log" for source in SOURCES}
    for log in sorted(own | {*LOGS.glob("level1_*.log")}):
        for kernel in kernels_of(log):
            kernels[kernel["arch"]] += 1
            if spilled := int(kernel["stores"]) + int(kernel["loads"]):
                spilling[kernel["arch"]] += 1
                said = f"{kernel['name']} uses {kernel['registers']} registers and spills {spilled} bytes"
                print(f"{kernel['arch']} {log.name.removesuffix('_cu.o.log')}: {said}")
    for arch in REFUSED:
        if not kernels[arch]:
            sys.exit(f"no kernel was built for {arch}: build without TORCH_CUDA_ARCH_LIST")
    for arch, number in sorted(kernels.items()):
        print(f"{arch}: {number} kernels, {spilling[arch]} spill registers")
    return 1 if any(spilling[arch] for arch in REFUSED) else 0


if __name__ == "__main__":
    sys.exit(main())
