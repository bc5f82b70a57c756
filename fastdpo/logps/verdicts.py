"""What checks of devices found, kept on disk: a small file for each device, driver, torch, build, dtype and level.

A file that cannot be read, or says something else than it should, is as good as none; one that cannot be written is
done without. It appears whole, by a rename, so processes that check at the same time do not see each other's halves.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import platformdirs


@dataclass(frozen=True)
class Verdict:
    """Of one path on one device.

    Attributes:
        passed: whether results were right.
        finding: what was wrong, in words; empty where nothing was.
        date: when it was found, as 2026-01-31.
    """

    passed: bool
    finding: str
    date: str


def folder() -> Path:
    """In the user's cache, as the system has it: on Linux $XDG_CACHE_HOME, or ~/.cache."""
    return platformdirs.user_cache_path("fastdpo", appauthor=False) / "self-check"


def load(facts: Mapping[str, str]) -> Verdict | None:
    """What was found where the facts were these; None where nothing was, or nothing that can be read."""
    # Of reading, of decoding, and of files that hold something else.
    with suppress(OSError, ValueError, TypeError, KeyError):
        kept = json.loads(_file(facts).read_text(encoding="utf-8"))
        verdict = Verdict(kept["passed"], kept["finding"], kept["date"])
        types = (type(verdict.passed), type(verdict.finding), type(verdict.date))
        if kept["facts"] == dict(facts) and types == (bool, str, str):
            return verdict
    return None


def store(facts: Mapping[str, str], verdict: Verdict) -> None:
    """Keeps it, if the folder can be written to."""
    with suppress(OSError):
        file = _file(facts)
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as unfinished:
            json.dump(asdict(verdict) | {"facts": dict(facts)}, unfinished, indent=1)
        Path(unfinished.name).replace(file)


def _file(facts: Mapping[str, str]) -> Path:
    key = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()
    return folder() / f"{key[:32]}.json"
