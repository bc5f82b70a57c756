"""The reference's log-probabilities of one dataset, on disk: what is there, and what it belongs to.

A folder holds

    manifest.json              what the numbers belong to (the key), and how they came about; for people and for checks
    completions.safetensors    a digest of each distinct completion behind its prompt, in the digests' order
    part-<name>.safetensors    while the cache is built: the completions scored so far
    logps.safetensors          when it is complete: logps [completions], in that order

A kill leaves every file whole or absent. The numbers are sums over each completion; weighted ones where the loss weighs
tokens (LD-DPO). A completion stands there once, however many pairs it is in, and whether rows are pairs or groups.
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
from fastdpo.ref_cache.key import CacheKey, completion_differences, differences
from fastdpo.ref_cache.lock import HeldError, held

logger = logging.getLogger(__name__)

FORMAT = 2
# In the folder of a run. What begins with an underscore is not pushed to the Hub with the model.
DEFAULT_FOLDER = "_ref_cache"
MANIFEST, LOGPS, PARTS = "manifest.json", "logps.safetensors", "part-*.safetensors"
COMPLETIONS = "completions.safetensors"
_OLD_ROWS = "rows.safetensors"  # of FORMAT 1
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

    def check(self, key: CacheKey, digests: np.ndarray, describe: Callable[[list[int]], str] = str) -> CacheKey:
        """The key that the cache in this folder was begun with, if log-probabilities for ``key`` are the same.

        The two may differ in what one of them does not know: rows that came tokenised name no tokenizer.

        Args:
            key: what the caller is about to use log-probabilities for.
            digests: uint8 [C, 16], of the caller's completions; ``rows_fingerprint(digests) == key.completions``.
            describe: words by which a person knows one of some of them.

        Raises:
            RefCacheError: something differs; the message says all that does.
        """
        manifest = self._manifest_that_is_there()
        there, here = manifest["key"], asdict(key)
        found = differences(there, here)
        if there["completions"] != here["completions"]:
            found.append(self._differences(there, digests, describe))
        if found:
            model = _model_in(manifest)
            raise RefCacheError(
                f"{self.folder} holds the log-probabilities of another reference or of other data (model: {model}): "
                f"{'; '.join(found)}.\n{_advice(self.folder)}"
            )
        return CacheKey(**there)

    def _differences(self, there: dict[str, Any], digests: np.ndarray, describe: Callable[[list[int]], str]) -> str:
        before = read_tensors(self.folder / COMPLETIONS)
        if before is None or rows_fingerprint(before["digests"]) != there["completions"]:
            return f"the completions differ ({there['num_completions']} there, {len(digests)} here)"
        return completion_differences(before["digests"], digests, describe)

    def load(self) -> np.ndarray:
        """[C], of a complete cache.

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
        return tensors["logps"]

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
            write_tensors(self.folder / COMPLETIONS, {"digests": digests})
        self._write_manifest(key, about, complete=False)

    def discard(self) -> None:
        """Delete what caches are made of, and nothing else that the folder may hold."""
        for path in self.folder.glob("*"):
            if _is_ours(path) and path.name != _LOCK:
                path.unlink()

    def write_part(self, key: CacheKey, completions: np.ndarray, logps: np.ndarray) -> None:
        """Keep those of some completions. Safe from several processes, and against a kill at any moment."""
        tensors = {"completions": completions, "logps": logps}
        path = self.folder / PARTS.replace("*", uuid.uuid4().hex[:16])
        with self._saying_what_is_kept():
            write_tensors(path, tensors, key.fingerprint())

    def read_parts(self, key: CacheKey) -> tuple[np.ndarray, np.ndarray]:
        """(done bool, logps), each [C]: what the parts hold.

        Deletes damaged parts, and says so, and what a killed writer left; so nobody may be writing.
        """
        for path in self.folder.glob(f"{UNFINISHED}*"):
            path.unlink()
        done, logps = np.zeros(key.num_completions, bool), np.zeros(key.num_completions, np.float32)
        for path in sorted(self.folder.glob(PARTS)):
            part = read_tensors(path, key=key.fingerprint())
            if part is None:
                logger.warning("%s is damaged: its completions are computed again.", path)
                path.unlink()
                continue
            if not done.any():
                logps = np.zeros(key.num_completions, part["logps"].dtype)
            done[part["completions"]], logps[part["completions"]] = True, part["logps"]
        return done, logps

    def finish(self, key: CacheKey, about: dict[str, Any]) -> None:
        """Join the parts into one file, and mark the cache as complete.

        Raises:
            RefCacheError: completions are missing.
        """
        done, logps = self.read_parts(key)
        if not done.all():
            raise RefCacheError(
                f"{int((~done).sum())} of {len(done)} completions are missing in {self.folder} after all were "
                "computed. Is it on a file system that all machines of the run see?"
            )
        with self._saying_what_is_kept():
            write_tensors(self.folder / LOGPS, {"logps": logps}, key.fingerprint())
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
    names = (MANIFEST, COMPLETIONS, _OLD_ROWS, LOGPS, _LOCK)
    return path.name in names or path.match(PARTS) or path.name.startswith(UNFINISHED)


def _advice(folder: Path) -> str:
    return (
        f"Delete {folder} to have it built anew (`fastdpo cache-ref --rebuild` does both), or name another folder with "
        "ref_cache (--ref_cache)"
    )
