"""The machine from Python: options, kernels from PTX, memory, launches, and what was found wrong."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ptxrun import encode
from ptxrun.parse import PtxError, Source, kernels_of, parse

_PROVIDE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)


class Fault(Exception):
    """What a kernel did that no device promises to forgive."""


@dataclass(frozen=True)
class Options:
    """How kernels are run.

    ``random``: groups of lanes of random warps, blocks in random order, from ``seed``; else the lowest program counter
    first. ``uneven``: at random, but blocks of a cluster, and in them fours of warps, run ahead of each other as far as
    they can. ``late``: asynchronous operations take effect as late as the waits for them allow. ``perturb``: .approx
    instructions err by what PTX allows. ``most_instructions`` of a launch, 0 for no limit.
    """

    random: bool = False
    uneven: bool = False
    late: bool = False
    perturb: bool = False
    races: bool = True
    seed: int = 0
    most_instructions: int = 0


@dataclass(frozen=True)
class Counts:
    warp_instructions: int
    launches: int
    barriers: int
    mbarrier_phases: int
    tma_bytes: int
    wgmmas: int

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*(a - b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


class Machine:
    """One a process and library: kernels and memory are the library's."""

    def __init__(self, library: Path) -> None:
        self.library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        for name, result in {
            "ptx_fault": ctypes.c_char_p,
            "ptx_launches": ctypes.c_char_p,
            "ptx_program": ctypes.c_void_p,
            "ptx_allocate": ctypes.c_uint64,
        }.items():
            getattr(self.library, name).restype = result
        self.sources: dict[str, Source] = {}
        self._provide = _PROVIDE(self._provide_program)
        self.library.ptx_on_missing_program(self._provide)
        self.options()

    # -------------------------------------------------------------------------------------------- kernels

    def add(self, text: str) -> list[str]:
        """Makes a PTX module's kernels available; they are translated when they are first launched."""
        found = kernels_of(text)
        for name in found:
            self.library.ptx_forget(name.encode())
        self.sources |= found
        return list(found)

    def replace(self, source: Source) -> None:
        """Puts a kernel in the place of the one with its name."""
        self.library.ptx_forget(source.name.encode())
        self.sources[source.name] = source

    def load(self, name: str) -> None:
        """Translates a kernel now. Raises PtxError."""
        encode.load(self.library, parse(self.sources[name]))

    def _provide_program(self, name: bytes) -> int:
        try:
            if name.decode() not in self.sources:
                return 0
            self.load(name.decode())
        except PtxError as error:
            self.library.ptx_set_fault(str(error).encode())
            return 0
        return 1

    # -------------------------------------------------------------------------------------------- settings and counts

    def options(self, options: Options | None = None) -> None:
        o = options or Options()
        self.library.ptx_options(
            int(o.random),
            int(o.uneven),
            int(o.late),
            int(o.perturb),
            int(o.races),
            ctypes.c_uint64(o.seed),
            ctypes.c_uint64(o.most_instructions),
        )

    @contextmanager
    def with_options(self, **options: Any) -> Iterator[None]:
        self.options(Options(**options))
        try:
            yield
        finally:
            self.options()

    def counts(self) -> Counts:
        values = (ctypes.c_uint64 * 6)()
        self.library.ptx_counts(values)
        return Counts(*values)

    def launched(self) -> list[str]:
        """The kernels launched since this was last asked, in order."""
        return self.library.ptx_launches().decode().split()

    def fault(self) -> str:
        return self.library.ptx_fault().decode()

    def clear_fault(self) -> None:
        self.library.ptx_clear_fault()

    # -------------------------------------------------------------------------------------------- launches

    def run(
        self,
        name: str,
        arguments: list[np.ndarray | np.generic],
        *,
        grid: int = 1,
        block: int = 32,
        cluster: int = 1,
        dynamic_shared: int = 0,
        unknown: tuple[int, ...] = (),
    ) -> None:
        """Launches a kernel: arrays are passed by address, scalars as they are. Raises Fault.

        ``unknown`` are the indices of arrays that count as not written yet.
        """
        addresses, values = [], []
        for index, argument in enumerate(arguments):
            if isinstance(argument, np.ndarray):
                assert argument.flags.c_contiguous
                address = self.library.ptx_allocate(
                    f"argument {index}".encode(),
                    ctypes.c_uint64(argument.nbytes),
                    ctypes.c_void_p(argument.ctypes.data),
                    int(index not in unknown),
                )
                addresses.append(address)
                values.append(np.array(address, np.uint64))
            else:
                values.append(np.asarray(argument))
        sizes = (ctypes.c_uint32 * 9)(grid, 1, 1, block, 1, 1, cluster, 1, 1)
        pointers = (ctypes.c_void_p * len(values))(*(v.ctypes.data for v in values))
        self.library.ptx_clear_fault()
        failed = self.library.ptx_launch(name.encode(), sizes, ctypes.c_uint64(dynamic_shared), pointers)
        for address in addresses:
            self.library.ptx_free(ctypes.c_uint64(address))
        if failed:
            raise Fault(self.fault())
