"""The demo's output folder: it replaces what an earlier demo wrote there, and never anything else."""

from __future__ import annotations

import json
from pathlib import Path

from fastdpo.errors import UsageError

_LIST = "demo-files.json"
_NOTE = "written by `fastdpo demo`; a later demo deletes these files, and no others"


class OutputFolder:
    """Hands out paths in a folder, and keeps a list of them there.

    Args:
        root: the folder; it is made if need be.

    Raises:
        UsageError: it cannot be a folder.
    """

    def __init__(self, root: Path) -> None:
        if root.exists() and not root.is_dir():
            raise UsageError(f"--output_dir {root} is a file; name a folder.")
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--output_dir {root} cannot be made: {error.strerror}.") from None
        self.root = root
        self._ours: list[str] = []

    def clear_earlier_demo(self) -> int:
        """Delete the files on the list of an earlier demo; returns how many there were."""
        listing = self.root / _LIST
        if not listing.exists():
            return 0
        try:
            names = json.loads(listing.read_text(encoding="utf-8"))["files"]
        except (ValueError, KeyError, TypeError):
            raise UsageError(f"{listing} cannot be read; name another folder with --output_dir.") from None
        deleted = 0
        for name in names:
            path = (self.root / name).resolve()
            # A list that someone edited must not reach out of the folder.
            if path.is_relative_to(self.root.resolve()) and path.is_file():
                path.unlink()
                deleted += 1
        listing.unlink()
        return deleted

    def file(self, name: str) -> Path:
        """The path of a file that is about to be written.

        Raises:
            UsageError: there is one, and it is not of an earlier demo.
        """
        path = self.root / name
        if path.exists():
            raise UsageError(f"{path} is in the way and was not written by a demo; name another folder (--output_dir).")
        self._note([name])
        return path

    def check_free(self, *names: str) -> None:
        """Raise UsageError now if one of these could not be written later: a file, or a folder that is not empty."""
        for name in names:
            path = self.root / name
            if path.is_file() or (path.is_dir() and any(path.iterdir())):
                raise UsageError(
                    f"{path} is in the way and was not written by a demo; name another folder (--output_dir)."
                )

    def note_contents(self, name: str) -> None:
        """Put all files of a subfolder that the demo has just filled on the list."""
        folder = self.root / name
        self._note(sorted(path.relative_to(self.root).as_posix() for path in folder.rglob("*") if path.is_file()))

    def _note(self, names: list[str]) -> None:
        # At once: a run that is stopped leaves files too.
        self._ours += names
        text = json.dumps({"note": _NOTE, "files": self._ours}, indent=2)
        (self.root / _LIST).write_text(text + "\n", encoding="utf-8")
