"""Whether the machine and the oracle let a broken kernel pass."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, uint8

from ptxrun.machine import Machine, Options
from ptxrun.mutate import Mutation

# A call of the ops whose results are held against the oracle; it raises where something is wrong, and returns them.
Call = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Verdict:
    mutation: Mutation
    how: str  # what caught it; empty where nothing did
    same_bytes: bool  # of every result of every call, as without the edit

    @property
    def caught(self) -> bool:
        return bool(self.how)

    def __str__(self) -> str:
        if self.caught:
            return f"caught   {self.mutation} -> {self.how[:160]}"
        return f"SURVIVED {self.mutation} -> {'the same bytes' if self.same_bytes else 'other bytes'}"


def run(machine: Machine, calls: Iterable[tuple[Options, Call]]) -> str:
    """Makes the calls, and returns a digest of all their results."""
    digest = hashlib.sha256()
    for options, call in calls:
        machine.options(options)
        machine.clear_fault()
        for result in call():
            digest.update(result.contiguous().view(uint8).numpy().tobytes())
    return digest.hexdigest()


def judge(
    machine: Machine,
    mutation: Mutation,
    calls: Iterable[tuple[Options, Call]],
    as_it_was: str,
    new_device: Callable[[], None],
) -> Verdict:
    """Makes the calls with the kernel replaced, until one of them goes wrong. ``as_it_was`` is the digest without."""
    source = machine.sources[mutation.kernel]
    machine.replace(dataclasses.replace(source, body=mutation.body))
    try:
        return Verdict(mutation, "", run(machine, calls) == as_it_was)
    except (RuntimeError, AssertionError) as error:
        return Verdict(mutation, machine.fault() or " ".join(str(error).split()) or "an assertion", False)
    finally:
        machine.options()
        machine.replace(source)
        new_device()
