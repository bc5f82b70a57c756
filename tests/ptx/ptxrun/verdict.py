"""Whether the machine and the oracle let a broken kernel pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ptxrun.machine import Machine, Options
from ptxrun.mutate import Mutation

# A call of the ops whose results are held against the oracle; it raises where something is wrong.
Call = Callable[[], None]


@dataclass(frozen=True)
class Verdict:
    mutation: Mutation
    how: str  # what caught it; empty where nothing did

    @property
    def caught(self) -> bool:
        return bool(self.how)

    def __str__(self) -> str:
        return f"{'caught  ' if self.how else 'SURVIVED'} {self.mutation}" + (
            f" -> {self.how[:160]}" if self.how else ""
        )


def judge(
    machine: Machine, mutation: Mutation, calls: Iterable[tuple[Options, Call]], new_device: Callable[[], None]
) -> Verdict:
    """Runs the calls with the kernel replaced, until one of them goes wrong."""
    source = machine.sources[mutation.kernel]
    machine.replace(dataclasses.replace(source, body=mutation.body))
    try:
        for options, call in calls:
            machine.options(options)
            machine.clear_fault()
            try:
                call()
            except (RuntimeError, AssertionError) as error:
                return Verdict(mutation, machine.fault() or " ".join(str(error).split()) or "an assertion")
        return Verdict(mutation, "")
    finally:
        machine.options()
        machine.replace(source)
        new_device()
