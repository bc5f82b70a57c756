"""Compiles every CUDA source for sm_80 and sm_90a, prints the kernels' registers, and fails where one spills.

Level 1's, which need CUTLASS and minutes, are looked at as they were built (tests/cuda/test_library.py).
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = sorted((Path(__file__).resolve().parent.parent / "csrc/cuda").glob("*.cu"))
ARCHS = ("80", "90a")
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


def resource_report(source: Path, arch: str, folder: str) -> list[tuple[str, int, int]]:
    """(kernel, registers, spilled bytes) of each kernel in the source."""
    gencode = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    command = [
        "nvcc",
        "-std=c++20",
        "-O3",
        "--expt-relaxed-constexpr",
        "-Xptxas",
        "-v",
        gencode,
        "-c",
        source,
        "-o",
        f"{folder}/out.o",
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{source.name} does not compile for sm_{arch}:\n{result.stderr}")
    report, kernel, spilled = [], "", 0
    for line in result.stderr.splitlines():
        if match := ENTRY.search(line):
            kernel, spilled = match[1], 0
        elif match := SPILLS.search(line):
            spilled = int(match[2]) + int(match[3])
        elif (match := REGISTERS.search(line)) and kernel:
            report.append((kernel, int(match[1]), spilled))
            kernel = ""
    return report


def main() -> int:
    kernels = spilling = 0
    with tempfile.TemporaryDirectory() as folder:
        for source in SOURCES:
            for arch in ARCHS:
                for kernel, registers, spilled in resource_report(source, arch, folder):
                    kernels += 1
                    spilling += spilled > 0
                    if spilled:
                        print(
                            f"sm_{arch} {source.name}: {kernel} uses {registers} registers and spills {spilled} bytes"
                        )
    print(f"{kernels} kernels compiled for {', '.join('sm_' + arch for arch in ARCHS)}; {spilling} spill registers")
    return 1 if spilling or not kernels else 0


if __name__ == "__main__":
    sys.exit(main())
