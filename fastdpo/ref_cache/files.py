"""The reference's log-probabilities of one dataset, on disk: what is there, and what it belongs to.

A folder holds

    manifest.json              what the numbers belong to (the key), and how they came about; for people and for checks
    rows.safetensors           a digest of each row's token ids, to tell which row differs
    part-<name>.safetensors    while the cache is built: the rows scored so far
    logps.safetensors          when it is complete: chosen_logps and rejected_logps [rows], in the dataset's order

A kill leaves every file whole or absent. The numbers are sums over each completion; weighted ones where the loss weighs
tokens (LD-DPO).
"""

from __future__ import annotations

import contextlib
import json
import logging
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from fastdpo.data.row_digests import rows_fingerprint
from fastdpo.errors import InputError
from fastdpo.ref_cache.durable import UNFINISHED, read_tensors, write_json, write_tensors
from fastdpo.ref_cache.key import CacheKey, differences, row_differences
from fastdpo.ref_cache.lock import HeldError, held

logger = logging.getLogger(__name__)

FORMAT = 1
# In the folder of a run. What begins with an underscore is not pushed to the Hub with the model.
DEFAULT_FOLDER = "_ref_cache"
MANIFEST, ROWS, LOGPS, PARTS = "manifest.json", "rows.safetensors", "logps.safetensors", "part-*.safetensors"
_LOCK = ".lock"


class RefCacheError(InputError):
    """A reference cache that cannot be used; the message says which, why, and what to do."""


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
            manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            known = manifest["format"] == FORMAT and manifest["key"].keys() == {f.name for f in fields(CacheKey)}
            # What the key says is what was written: its values are looked into without another check.
            sound = not known or CacheKey(**manifest["key"]).fingerprint() == manifest["key_fingerprint"]
            sound = sound and isinstance(manifest["complete"], bool)
        except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
            raise RefCacheError(f"{path} cannot be read ({error!r}). {_advice(self.folder)}") from error
        if not known:
            raise RefCacheError(f"{path} is of another version of fastdpo. {_advice(self.folder)}")
        if not sound:
            raise RefCacheError(f"{path} is damaged, or was changed after it was written. {_advice(self.folder)}")
        return manifest

    def _manifest_that_is_there(self) -> dict[str, Any]:
        manifest = self.manifest()
        if manifest is None:
            raise RefCacheError(f"{self.folder / MANIFEST} is gone. {_advice(self.folder)}")
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
        manifest = self._manifest_that_is_there()
        there, here = manifest["key"], asdict(key)
        found = differences(there, here)
        if there["rows"] != here["rows"]:
            found.append(self._row_differences(there, digests, describe_row))
        if found:
            model = _model_in(manifest)
            raise RefCacheError(
                f"{self.folder} holds the log-probabilities of another reference or of other data (model: {model}): "
                f"{'; '.join(found)}.\n{_advice(self.folder)}"
            )
        return CacheKey(**there)

    def _row_differences(self, there: dict[str, Any], digests: np.ndarray, describe_row: Callable[[int], str]) -> str:
        before = read_tensors(self.folder / ROWS)
        if before is None or rows_fingerprint(before["digests"]) != there["rows"]:
            return f"the rows differ ({there['num_rows']} there, {len(digests)} here)"
        return row_differences(before["digests"], digests, describe_row)

    def load(self) -> tuple[np.ndarray, np.ndarray]:
        """(chosen, rejected), each [rows], of a complete cache.

        Raises:
            RefCacheError: the file is damaged.
        """
        manifest = self._manifest_that_is_there()
        tensors = read_tensors(self.folder / LOGPS, key=manifest["key_fingerprint"])
        if tensors is None:
            raise RefCacheError(f"{self.folder / LOGPS} is damaged or absent. {_advice(self.folder)}")
        if manifest["complete"]:  # a kill came before the parts, which are in it, were gone
            with contextlib.suppress(OSError):  # somebody's cache, that may be read alone
                self._remove_parts()
        return tensors["chosen_logps"], tensors["rejected_logps"]

    # ----------------------------------------------------------------------------------------------------------------
    # Writing
    # ----------------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps a second builder out. A killed builder's lock is gone with it."""
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(held(self.folder / _LOCK))
            except HeldError as holder:
                raise RefCacheError(
                    f"{holder} is building the reference cache in {self.folder}. Wait for it, or name another folder "
                    "with ref_cache (--ref_cache)"
                ) from None
            yield

    def begin(self, key: CacheKey, digests: np.ndarray, about: dict[str, Any]) -> None:
        """Write what the log-probabilities to come belong to. ``about``: facts that are not compared."""
        self.discard()
        with self._saying_what_is_kept():
            write_tensors(self.folder / ROWS, {"digests": digests})
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
        with self._saying_what_is_kept():
            write_tensors(path, tensors, key.fingerprint())

    def read_parts(self, key: CacheKey) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(done bool, chosen, rejected), each [rows]: what the parts hold.

        Deletes damaged parts, and says so, and what a killed writer left; so nobody may be writing.
        """
        for path in self.folder.glob(f"{UNFINISHED}*"):
            path.unlink()
        done = np.zeros(key.num_rows, bool)
        chosen = rejected = np.zeros(key.num_rows, np.float32)
        for path in sorted(self.folder.glob(PARTS)):
            part = read_tensors(path, key=key.fingerprint())
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
        with self._saying_what_is_kept():
            write_tensors(self.folder / LOGPS, tensors, key.fingerprint())
        self._write_manifest(key, about, complete=True)
        self._remove_parts()

    def _remove_parts(self) -> None:
        for path in self.folder.glob(PARTS):
            path.unlink(missing_ok=True)  # a reader may have been faster

    def _write_manifest(self, key: CacheKey, about: dict[str, Any], *, complete: bool) -> None:
        manifest = {
            "format": FORMAT,
            "what": "log-probabilities of a reference model, summed over each completion, in nats",
            "complete": complete,
            "about": about,
            "key": asdict(key),
            "key_fingerprint": key.fingerprint(),
        }
        with self._saying_what_is_kept():
            write_json(self.folder / MANIFEST, manifest)

    @contextlib.contextmanager
    def _saying_what_is_kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            parts = len(list(self.folder.glob(PARTS)))
            kept = f"The {parts} parts that were computed before are kept, and" if parts else "Once there is room"
            raise RefCacheError(
                f"a file of the reference cache {self.folder} could not be written: {error.strerror or error}. {kept} "
                "the same command goes on from there"
            ) from error


def _model_in(manifest: dict[str, Any]) -> str:
    about = manifest.get("about")
    return str(about.get("model", "another model")) if isinstance(about, dict) else "another model"


def _is_ours(path: Path) -> bool:
    names = (MANIFEST, ROWS, LOGPS, _LOCK)
    return path.name in names or path.match(PARTS) or path.name.startswith(UNFINISHED)


def _advice(folder: Path) -> str:
    return (
        f"Delete {folder} to have it built anew (`fastdpo cache-ref --rebuild` does both), or name another folder with "
        "ref_cache (--ref_cache)"
    )
