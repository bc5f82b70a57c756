"""What a judge has answered, on disk, by what it was asked: asked again, the same question costs nothing."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

from fastdpo.evaluation.judge_client import JudgeError
from fastdpo.trainer.disk import why_not_written


class JudgeAnswers:
    """A file of lines, one an answer: ``{"key": …, "reply": …}``. A kill costs the line that was being written.

    The key is a digest of the messages, and of the judge; the file holds neither.

    Args:
        path: of the file; made with the first answer.

    Attributes:
        any_was_of_use: whether any question of this run has an answer, from before or new.

    Raises:
        JudgeError: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.any_was_of_use = False
        self._lock = threading.Lock()
        self._known: dict[str, str] = {}
        self._ends_whole = True
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise JudgeError(f"the judge's answers {path} cannot be read: {error.strerror}") from error
        self._ends_whole = content.endswith(b"\n") or not content
        for line in content.split(b"\n"):
            try:
                entry = json.loads(line)
                key, reply = entry["key"], entry["reply"]
            except (ValueError, LookupError, TypeError, RecursionError):
                continue  # torn by a kill, or nothing
            if isinstance(key, str) and isinstance(reply, str):
                self._known[key] = reply

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> str | None:
        found = self._known.get(key)
        self.any_was_of_use |= found is not None
        return found

    def keep(self, key: str, reply: str) -> None:
        """Write an answer, through to the disk; from any thread.

        Raises:
            JudgeError: it cannot be written.
        """
        line = json.dumps({"key": key, "reply": reply}).encode() + b"\n"
        with self._lock:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "ab") as file:
                    file.write(line if self._ends_whole else b"\n" + line)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError as error:
                self._ends_whole = False
                why = why_not_written(error) or error.strerror or error
                raise JudgeError(
                    f"the judge's answers {self.path} could not be written: {why}. Those before are kept, and the same "
                    "command goes on from there"
                ) from error
            self._ends_whole = True
            self._known[key] = reply
            self.any_was_of_use = True


def key_of(identity: dict[str, Any], messages: list[dict[str, str]]) -> str:
    """A digest of who is asked what."""
    return hashlib.sha256(json.dumps([identity, messages], sort_keys=True).encode()).hexdigest()
