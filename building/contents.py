"""What a wheel, or a library in it, must not have: the paths of the machine that it was made on."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

# Absolute names of files that only who compiles has. The CUDA runtime has absolute paths of its own, of the system's
# folders; they name none of these.
_SOURCE = re.compile(rb"/[\w.+/-]+\.(?:h|hh|hpp|cuh|inl|c|cc|cpp|cu|o|py)\b")


def local_paths(data: bytes, folders: list[Path]) -> list[str]:
    """Absolute names of sources, and mentions of ``folders``, in a file's bytes."""
    found = []
    for text in re.findall(rb"[\x20-\x7e]{4,}", data):
        # What stands before tells an absolute path from the end of a relative one.
        sources = [
            m.group() for m in _SOURCE.finditer(text) if not re.match(rb"[\w.+-]", text[max(0, m.start() - 1) :])
        ]
        if sources or any(str(folder).encode() in text for folder in folders):
            found.append(text.decode())
    return found


def members(wheel: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            yield name, archive.read(name)
