"""One run in an output folder: two would mix their checkpoints, and each would end as if nothing had been."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from fastdpo.errors import InputError
from fastdpo.ref_cache.lock import HeldError, held
from fastdpo.trainer.leftovers import remove_leftovers

# What begins with an underscore is not pushed to the Hub.
LOCK_FILE = "_run.lock"
_of_this_process: set[Path] = set()


@contextmanager
def only_run_in(output_dir: Path, *, is_main: bool = True) -> Iterator[None]:
    """Keep other processes' runs out of ``output_dir`` for the duration of the block; what dead ones left goes.

    Args:
        output_dir: made where it is not there; a run that left nothing in it does not leave it either.
        is_main: this process is the one of the run that writes; the others do nothing.

    Raises:
        InputError: another run is in it; the message says which process, on which machine.
    """
    output_dir = output_dir.resolve()
    if not is_main or output_dir in _of_this_process:
        yield
        return
    with ExitStack() as stack:
        if not output_dir.exists():
            stack.callback(_remove_empty, output_dir)
        try:
            stack.enter_context(held(output_dir / LOCK_FILE))
        except HeldError as holder:
            raise InputError(
                f"{output_dir}: {holder}, trains in this folder, and two runs would mix their checkpoints. Wait for "
                "it, stop it, or name another output_dir (--output_dir)"
            ) from None
        _of_this_process.add(output_dir)
        stack.callback(_of_this_process.discard, output_dir)
        remove_leftovers(output_dir)
        yield


def _remove_empty(folder: Path) -> None:
    with suppress(OSError):  # something is in it, or it is gone
        folder.rmdir()
