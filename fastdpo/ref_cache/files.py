"""The reference's log-probabilities of one dataset, on disk: what they belong to, and files that survive a kill.

A folder holds

    manifest.json              what the numbers belong to (the key), and how they came about; for people and for checks
    rows.safetensors           a digest of each row's token ids, to tell which row differs
    part-<name>.safetensors    while the cache is built: the rows scored so far
    logps.safetensors          when it is complete: chosen_logps and rejected_logps [rows], in the dataset's order

Every file is written beside its place, flushed to the disk, and then renamed, so that a kill leaves it whole or absent.
The numbers are sums over each completion; weighted ones where the loss weighs tokens (LD-DPO).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fastdpo.data.row_digests import rows_fingerprint
from fastdpo.errors import InputError
from fastdpo.ref_cache.fingerprints import DATED

logger = logging.getLogger(__name__)

FORMAT = 1
# In the folder of a run. What begins with an underscore is not pushed to the Hub with the model.
DEFAULT_FOLDER = "_ref_cache"
MANIFEST, ROWS, LOGPS, PARTS = "manifest.json", "rows.safetensors", "logps.safetensors", "part-*.safetensors"
_UNFINISHED = ".unfinished-"
_LOCK = ".lock"


class RefCacheError(InputError):
    """A reference cache that cannot be used; the message says which, why, and what to do."""


@dataclass(frozen=True)
class CacheKey:
    """What reference log-probabilities depend on. Two caches are interchangeable when all of this is equal.

    Attributes:
        weights: fingerprint of the reference's weights.
        config: what its configuration says about the function that it computes.
        weights_dtype, compute_dtype: of the weights in memory, and of the products (another under autocast).
        tokenizer, chat_template: fingerprints; None where rows came tokenised, or there is no template.
        max_length, truncation_mode: how sequences are cut.
        masking: what made the mask of the tokens that count, and LD-DPO's weight of some of them.
        num_rows, rows: how many rows, and the fingerprint of their token ids before any cut.
    """

    weights: str
    config: dict[str, Any]
    weights_dtype: str
    compute_dtype: str
    tokenizer: str | None
    chat_template: str | None
    max_length: int | None
    truncation_mode: str | None
    masking: str
    num_rows: int
    rows: str

    def fingerprint(self) -> str:
        """sha256 over all of it: parts carry it, so that those of another cache are never taken in."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


class RefCache:
    """One dataset's cache, in a folder of its own. The folder is made when something is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    # ----------------------------------------------------------------------------------------------------------------
    # What is there
    # ----------------------------------------------------------------------------------------------------------------

    def manifest(self) -> dict[str, Any] | None:
        """The manifest; None if no cache was begun here.

        Raises:
            RefCacheError: it is damaged, or of another format, or the folder holds other things.
        """
        path = self.folder / MANIFEST
        if not path.exists():
            foreign = [p.name for p in self.folder.glob("*") if not _is_ours(p)] if self.folder.is_dir() else []
            if foreign:
                raise RefCacheError(
                    f"{self.folder} is no reference cache: it has no {MANIFEST}, and holds "
                    f"{', '.join(sorted(foreign)[:3])}. Name another folder with ref_cache (--ref_cache)"
                )
            return None
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            known = manifest["format"] == FORMAT and manifest["key"].keys() == {f.name for f in fields(CacheKey)}
            complete = manifest["complete"]
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise RefCacheError(f"{path} cannot be read ({error!r}). {_advice(self.folder)}") from error
        if not known or not isinstance(complete, bool):
            raise RefCacheError(f"{path} is of another version of fastdpo. {_advice(self.folder)}")
        return manifest

    def check(self, key: CacheKey, digests: np.ndarray, describe_row: Callable[[int], str] = str) -> CacheKey:
        """The key that the cache in this folder was begun with, if log-probabilities for ``key`` are the same.

        The two may differ in what one of them does not know: rows that came tokenised name no tokenizer.

        Args:
            key: what the caller is about to use log-probabilities for.
            digests: uint8 [rows, 16], of the caller's rows; ``rows_fingerprint(digests) == key.rows``.
            describe_row: words by which a person knows a row.

        Raises:
            RefCacheError: something differs; the message says all that does.
        """
        manifest = self.manifest()
        there, here = manifest["key"], asdict(key)
        found = _differences(there, here)
        if there["rows"] != here["rows"]:
            found.append(self._row_differences(there, digests, describe_row))
        if found:
            model = manifest["about"].get("model", "another model")
            raise RefCacheError(
                f"{self.folder} holds the log-probabilities of another reference or of other data (model: {model}): "
                f"{'; '.join(found)}.\n{_advice(self.folder)}"
            )
        return CacheKey(**there)

    def _row_differences(self, there: dict[str, Any], digests: np.ndarray, describe_row: Callable[[int], str]) -> str:
        before = _read_tensors(self.folder / ROWS)
        if before is None or rows_fingerprint(before["digests"]) != there["rows"]:
            return f"the rows differ ({there['num_rows']} there, {len(digests)} here)"
        before = before["digests"]
        common = min(len(before), len(digests))
        differing = np.flatnonzero((before[:common] != digests[:common]).any(1))
        counts = f"{len(before)} rows there, {len(digests)} here" if len(before) != len(digests) else ""
        if not len(differing):
            return f"{counts}, equal as far as both go"
        if not counts and sorted(map(bytes, before)) == sorted(map(bytes, digests)):
            return "the same rows in another order"
        first = int(differing[0])
        more = f", and {len(differing) - 1} more" if len(differing) > 1 else ""
        return f"{counts + ', ' if counts else ''}kept row {first} differs ({describe_row(first)}){more}"

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """(chosen, rejected), each [rows], of a complete cache.

        Raises:
            RefCacheError: the file is damaged.
        """
        manifest = self.manifest()
        tensors = _read_tensors(self.folder / LOGPS, key=manifest["key_fingerprint"])
        if tensors is None:
            raise RefCacheError(f"{self.folder / LOGPS} is damaged or absent. {_advice(self.folder)}")
        return tensors["chosen_logps"], tensors["rejected_logps"]

    # ----------------------------------------------------------------------------------------------------------------
    # Writing
    # ----------------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps a second builder out. A killed builder's lock is gone with it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / _LOCK).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RefCacheError(
                    f"another process is building the reference cache in {self.folder}. Wait for it, or name another "
                    "folder with ref_cache (--ref_cache)"
                ) from error
            yield

    def begin(self, key: CacheKey, digests: np.ndarray, about: dict[str, Any]) -> None:
        """Write what the log-probabilities to come belong to. ``about``: facts that are not compared."""
        self.discard()
        _write(self.folder / ROWS, save({"digests": np.ascontiguousarray(digests)}, _metadata({"digests": digests})))
        self._write_manifest(key, about, complete=False)

    def discard(self) -> None:
        """Delete what caches are made of, and nothing else that the folder may hold."""
        for path in self.folder.glob("*"):
            if _is_ours(path) and path.name != _LOCK:
                path.unlink()

    def write_part(self, key: CacheKey, rows: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> None:
        """Keep the log-probabilities of some rows. Safe from several processes, and against a kill at any moment."""
        tensors = {"rows": rows, "chosen_logps": chosen, "rejected_logps": rejected}
        path = self.folder / PARTS.replace("*", uuid.uuid4().hex[:16])
        _write(path, save(tensors, _metadata(tensors, key.fingerprint())))

    def read_parts(self, key: CacheKey) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(done bool, chosen, rejected), each [rows]: what the parts hold.

        Deletes damaged parts, and says so, and what a killed writer left; so nobody may be writing.
        """
        for path in self.folder.glob(f"{_UNFINISHED}*"):
            path.unlink()
        done = np.zeros(key.num_rows, bool)
        chosen = rejected = np.zeros(key.num_rows, np.float32)
        for path in sorted(self.folder.glob(PARTS)):
            part = _read_tensors(path, key=key.fingerprint())
            if part is None:
                logger.warning("%s is damaged: its rows are computed again.", path)
                path.unlink()
                continue
            if not done.any():
                chosen, rejected = (np.zeros(key.num_rows, part["chosen_logps"].dtype) for _ in range(2))
            rows = part["rows"]
            done[rows], chosen[rows], rejected[rows] = True, part["chosen_logps"], part["rejected_logps"]
        return done, chosen, rejected

    def finish(self, key: CacheKey, about: dict[str, Any]) -> None:
        """Join the parts into one file, and mark the cache as complete.

        Raises:
            RefCacheError: rows are missing.
        """
        done, chosen, rejected = self.read_parts(key)
        if not done.all():
            raise RefCacheError(
                f"{int((~done).sum())} of {len(done)} rows are missing in {self.folder} after all were computed. "
                "Is it on a file system that all machines of the run see?"
            )
        tensors = {"chosen_logps": chosen, "rejected_logps": rejected}
        _write(self.folder / LOGPS, save(tensors, _metadata(tensors, key.fingerprint())))
        self._write_manifest(key, about, complete=True)
        for path in self.folder.glob(PARTS):
            path.unlink()

    def _write_manifest(self, key: CacheKey, about: dict[str, Any], *, complete: bool) -> None:
        manifest = {
            "format": FORMAT,
            "what": "log-probabilities of a reference model, summed over each completion, in nats",
            "complete": complete,
            "about": about,
            "key": asdict(key),
            "key_fingerprint": key.fingerprint(),
        }
        _write(self.folder / MANIFEST, (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode())


def _is_ours(path: Path) -> bool:
    names = (MANIFEST, ROWS, LOGPS, _LOCK)
    return path.name in names or path.match(PARTS) or path.name.startswith(_UNFINISHED)


def _advice(folder: Path) -> str:
    return (
        f"Delete {folder} to have it built anew (`fastdpo cache-ref --rebuild` does both), or name another folder with "
        "ref_cache (--ref_cache)"
    )


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What differs beside the rows, in words."""
    found = []
    names = [name for name in here if here[name] != there[name] and name not in ("rows", "num_rows")]
    if None in (there["tokenizer"], here["tokenizer"]):
        # Rows came tokenised here or there, and have the same ids, or are found to differ.
        names = [name for name in names if name not in ("tokenizer", "chat_template")]
    for name in names:
        before, now = there[name], here[name]
        if name == "config":
            # Another version of transformers may know other keys; the values of those that both know count.
            keys = sorted(key for key in before.keys() & now.keys() if before[key] != now[key])
            found += [f"the model's {key} was {before[key]!r} and is {now[key]!r}" for key in keys]
        elif name == "weights":
            found.append(f"the weights differ ({before[:12]} there, {now[:12]} here)")
        elif name == "chat_template" and before and now and before.partition(DATED)[0] == now.partition(DATED)[0]:
            days = [value.partition(DATED)[2] or "another" for value in (before, now)]
            found.append(
                f"the chat template writes the date, which was {days[0]} and is {days[1]} (--template_date {days[0]} "
                "renders it as before)"
            )
        elif name in ("tokenizer", "chat_template"):
            found.append(f"the {name.replace('_', ' ')} differs")
        else:
            found.append(f"{name} was {before!r} and is {now!r}")
    return found


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


def _metadata(tensors: dict[str, np.ndarray], key: str = "") -> dict[str, str]:
    return {"key": key, "sha256": _checksum(tensors)}


def _checksum(tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        digest.update(np.ascontiguousarray(tensors[name]))
    return digest.hexdigest()


def _read_tensors(path: Path, key: str | None = None) -> dict[str, np.ndarray] | None:
    """The tensors of a file; None where it is absent, torn, altered, or belongs to another key."""
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata() or {}
    except (OSError, SafetensorError):
        return None
    sound = metadata.get("sha256") == _checksum(tensors) and (key is None or metadata.get("key") == key)
    return tensors if sound else None


def _write(path: Path, content: bytes) -> None:
    """All of it, or nothing: a reader never sees a file that is half there, whatever kills the writer."""
    unfinished = path.with_name(f"{_UNFINISHED}{uuid.uuid4().hex[:8]}-{path.name}")
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
