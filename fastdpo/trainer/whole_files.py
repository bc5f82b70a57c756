"""Files that are there whole, or not at all: a full disk, or a signal, leaves what was there before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_or_not_at_all(path: Path) -> Iterator[Path]:
    """A name beside ``path``, whose folder is made, to write to; it becomes ``path`` when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}")
    try:
        yield draft
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def write_text_whole(path: Path, text: str) -> None:
    """``text`` in UTF-8. Halves of a pair, as in names that are no text, become the escapes that JSON has for them."""
    with whole_or_not_at_all(path) as draft:
        draft.write_text(text, encoding="utf-8", errors="backslashreplace")
