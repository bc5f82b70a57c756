"""The help of ``train``, ``plan``, ``cache-ref`` and ``eval``, at once.

Their flags are those of the installed ``transformers.TrainingArguments``, which takes seconds to import: it brings
torch, PEFT, and bitsandbytes where that is installed. So the page that their parser makes is kept on disk, together
with what it was made from; it is served while all of that is the same, and made anew otherwise. Anything but ``--help``
alone goes to the parser itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import platformdirs

from fastdpo.commands.help_page import HelpPage


def print_help(command: str, argv: Sequence[str], make_page: Callable[[], HelpPage]) -> bool:
    """Print the help if nothing else was asked for.

    Args:
        command: whose.
        argv: the words after it.
        make_page: has the parser describe its flags; slow.

    Returns:
        Whether it was printed.
    """
    if list(argv) not in (["-h"], ["--help"], ["--help_all"]):
        return False
    path, made_from = _path(command), _made_from()
    page = _load(path, made_from)
    if page is None:
        page = make_page()
        # The folder may be read-only, or full; it serves speed alone.
        with contextlib.suppress(OSError):
            _save(path, made_from, page)
    everything = argv[0] == "--help_all"
    print(page.render(everything), end="\n" if everything else "")
    return True


def _path(command: str) -> Path:
    """One file a command and installation, which is replaced when it is out of date."""
    installation = hashlib.sha256(f"{sys.prefix} {__file__}".encode()).hexdigest()[:12]
    return platformdirs.user_cache_path("fastdpo", appauthor=False) / "help" / f"{command}-{installation}.json"


def _made_from() -> dict[str, Any]:
    """All that decides what the parser says: versions, and the state of the files that a checkout may change."""
    return {
        "python": sys.version,
        "versions": {name: _version(name) for name in ("fastdpo", "transformers", "accelerate", "torch")},
        "files": _digest(_source_files()),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # on the path, but not installed
        return None


def _source_files() -> Iterator[Path]:
    yield from Path(__file__).parents[1].rglob("*.py")
    transformers = importlib.util.find_spec("transformers")  # found, and not imported
    for folder in (transformers and transformers.submodule_search_locations) or ():
        yield from Path(folder).glob("*.py")


def _digest(files: Iterator[Path]) -> str:
    """Of names, sizes and times of change, by which Python itself tells that a module is to be compiled anew."""
    states = []
    for path in files:
        with contextlib.suppress(OSError):  # an editor's lock is a link to nowhere
            stat = path.stat()
            states.append(f"{path} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(sorted(states)).encode()).hexdigest()


def _load(path: Path, made_from: dict[str, Any]) -> HelpPage | None:
    """What was saved; None where there is nothing, something else, or what was made from something else."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return HelpPage.from_json(kept["page"]) if kept["made_from"] == made_from else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _save(path: Path, made_from: dict[str, Any], page: HelpPage) -> None:
    """Whole or not at all: another process may be reading or writing it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, draft = tempfile.mkstemp(dir=path.parent)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump({"made_from": made_from, "page": asdict(page)}, file, indent=1)
        os.replace(draft, path)
    except BaseException:
        os.unlink(draft)
        raise
