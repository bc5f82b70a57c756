"""A check of kernels on the user's own device, before the first result of theirs is used.

Nobody's tests have run on every device and driver. So before a process takes the kernels' path on a device, in a dtype
and at a level, small calls are compared with float64 (check_cases.py). Where they disagree, or cannot be launched,
plain PyTorch takes the kernels' place, with one warning. The outcome is kept on disk (verdicts.py).

FASTDPO_SELF_CHECK=off checks nothing and uses the kernels; FASTDPO_SELF_CHECK=strict raises in the place of going on
without them, or unchecked.
"""

from __future__ import annotations

import datetime
import os
import threading
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fastdpo.logps import verdicts
from fastdpo.logps.check_cases import Measured, Ops, measure
from fastdpo.logps.verdicts import Verdict

_VARIABLE = "FASTDPO_SELF_CHECK"
# Raised whenever what a check computes, or holds it against, is another: then earlier outcomes say nothing.
_EDITION = "1"
REPORT = "Please report it, with the table of `fastdpo info --check`."


class DeviceKind(Protocol):
    """What is asked about the devices of one kind."""

    name: str  # of their tensors, in messages

    def facts(self, device: torch.device) -> dict[str, str]:
        """What an outcome depends on, beside dtype and level; ``device`` among them is what people call it."""

    def misfit(self, device: torch.device) -> str | None:
        """Why kernels are known not to run there, without a try; None if they may."""

    def is_capturing(self, device: torch.device) -> bool:
        """Whether a graph is being captured there, in which nothing can be looked at."""

    def works(self, device: torch.device) -> bool:
        """Whether it still computes anything, after an error."""


class _Path(NamedTuple):
    """What is trusted, or not."""

    device: torch.device
    dtype: torch.dtype
    level: str

    @property
    def words(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} at Level {self.level}"


class Gate:
    """Stands before a kind of device's kernels, and takes the portable ops where these are not to be trusted."""

    def __init__(self, native: Ops, portable: Ops, kind: DeviceKind) -> None:
        self._native, self._portable, self._kind = native, portable, kind
        self._trusted: dict[_Path, bool] = {}
        self._unchecked: set[_Path] = set()  # of which has been said that they are
        self._lock = threading.Lock()

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return self._ops(hidden).forward(hidden, *args, **kwargs)

    def backward(self, grad_logps: Tensor, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return self._ops(hidden).backward(grad_logps, hidden, *args, **kwargs)

    def outcomes(self) -> dict[str, str]:
        """What was decided so far in this process, in words."""
        return {
            f"{path.device} {path.words}": "kernels, checked" if trusted else "portable"
            for path, trusted in self._trusted.items()
        }

    def check(self, device: torch.device, dtype: torch.dtype) -> Outcome:
        """Looks, whatever was found before, at the level that is asked for; keeps what is found."""
        path = _Path(device, dtype, _level())
        outcome = check(self._native, dtype, device)
        if outcome.verdict is not None:
            verdicts.store(self._facts(path), outcome.verdict)
        return outcome

    def _facts(self, path: _Path) -> dict[str, str]:
        facts = {"dtype": str(path.dtype), "level": path.level, "edition": _EDITION}
        return self._kind.facts(path.device) | facts

    def _ops(self, hidden: Tensor) -> Ops:
        path = _Path(hidden.device, hidden.dtype, _level())
        trusted = self._trusted.get(path)
        if trusted is None:
            with self._lock:  # a second thread waits for the first one's check
                trusted = self._trusted.get(path)
                if trusted is None:
                    trusted = self._decide(path)
        return self._native if trusted else self._portable

    def _decide(self, path: _Path) -> bool:
        mode, facts, kernels = _mode(), self._facts(path), f"fastdpo's {self._kind.name} kernels"
        if (misfit := self._kind.misfit(path.device)) is not None:
            return self._refuse(path, f"{facts['device']} cannot run {kernels}: {misfit}.", mode)
        if mode == "off":
            return True
        verdict = verdicts.load(facts)
        if verdict is None and self._kind.is_capturing(path.device):
            self._pass_unchecked(path, f"{kernels} have not been checked on {facts['device']}", mode)
            return True
        if verdict is None:
            verdict = self.check(path.device, path.dtype).verdict
            if verdict is None:
                return True
            if not verdict.passed and not self._kind.works(path.device):
                raise RuntimeError(
                    f"{kernels} left {facts['device']} unusable for this process: {verdict.finding}. Start it again: "
                    f"this was written down, and plain PyTorch will take their place. {REPORT}"
                )
        if verdict.passed:
            self._trusted[path] = True
            return True
        return self._refuse(
            path,
            f"{kernels} are not to be trusted on {facts['device']} for {path.words}: {verdict.finding} (found "
            f"{verdict.date}; `fastdpo info --check` looks again). {REPORT}",
            mode,
        )

    def _refuse(self, path: _Path, reason: str, mode: str) -> bool:
        if mode == "strict":
            raise RuntimeError(f"{reason} ({_VARIABLE} is strict.)")
        self._trusted[path] = False  # before the warning, which may be raised
        warnings.warn(f"{reason} Such tensors go through plain PyTorch, which is right and slower.", stacklevel=2)
        return False

    def _pass_unchecked(self, path: _Path, what: str, mode: str) -> None:
        said = f"{what} for {path.words}, and cannot be while a CUDA graph is captured: make one call before that"
        if mode == "strict":
            raise RuntimeError(f"{said} ({_VARIABLE} is strict.)")
        if path not in self._unchecked:
            self._unchecked.add(path)
            warnings.warn(f"{said}. They are used unchecked.", stacklevel=2)


def _level() -> str:
    """What FASTDPO_CUDA_LEVEL asks for (csrc/cuda/level.h)."""
    return os.environ.get("FASTDPO_CUDA_LEVEL") or "0"


def _mode() -> str:
    """What FASTDPO_SELF_CHECK says: on, off or strict."""
    value = os.environ.get(_VARIABLE) or "on"
    if value not in ("on", "off", "strict"):
        raise RuntimeError(f"{_VARIABLE} is '{value}'; it should be on, off or strict")
    return value


class Outcome(NamedTuple):
    """Of a check.

    Attributes:
        verdict: None where memory did not suffice for one.
        measured: how near each output came; empty where a call failed.
    """

    verdict: Verdict | None
    measured: list[Measured]

    @property
    def finding(self) -> str:
        """What was wrong, in words; empty where nothing was, or nothing is known."""
        return "" if self.verdict is None else self.verdict.finding


def check(ops: Ops, dtype: torch.dtype, device: torch.device) -> Outcome:
    """Small calls of the ops on the device, compared with float64.

    Raises:
        RuntimeError: one of FASTDPO's environment variables asks for what is not there.
    """
    today = datetime.date.today().isoformat()
    try:
        found = measure(ops, dtype, device)
    except Exception as error:  # whatever it is, the ops cannot be used
        if "FASTDPO_" in str(error):
            raise
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            return Outcome(None, [])
        return Outcome(Verdict(False, f"a small call failed with {_first_line(error)}", today), [])
    wrong = [one for one in found if not one.is_right]
    return Outcome(Verdict(not wrong, _words(wrong), today), found)


def _words(wrong: Sequence[Measured]) -> str:
    if not wrong:
        return ""
    worst = max(wrong, key=lambda one: one.excess)
    outputs = ", ".join(dict.fromkeys(one.output for one in wrong))
    return (
        f"results are wrong ({outputs}); worst is {worst.output} of the case '{worst.case}', off by {worst.error:.1e} "
        f"where {worst.bound:.1e} would be right"
    )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
