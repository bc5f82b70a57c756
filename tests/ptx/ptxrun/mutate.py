"""Edits of nvcc's PTX, each of which breaks a kernel: what the machine must not let pass."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ptxrun.parse import Source

SIZE = {"8": 1, "16": 2, "32": 4, "64": 8}


@dataclass(frozen=True)
class Mutation:
    kind: str
    kernel: str  # the whole name
    place: str  # the statement as it was
    number: int  # of the places of its kind in the kernel
    body: str  # the kernel's, with the edit

    def __str__(self) -> str:
        return f"{self.kind} ({self.number}): {self.place[:100]}"


@dataclass(frozen=True)
class Kind:
    """A pattern of one statement, and what it becomes; None where the place is none to edit."""

    name: str
    pattern: str
    becomes: Callable[[re.Match], str | None]


def _dropped(_: re.Match) -> str:
    return ""


def _moved(found: re.Match) -> str:
    """The address one element further."""
    vector = {"v2": 2, "v4": 4}.get(found["vector"] or "", 1)
    size = SIZE[re.search(r"\d+$", found["type"])[0]] * vector
    return f"{found['before']}[{found['address']}+{size}]" if "+" not in found["address"] else None


def access(name: str, op: str, space: str, becomes: Callable[[re.Match], str | None]) -> Kind:
    """Of the loads or stores of a kind of memory."""
    head = rf"(?P<before>{op}(?:\.volatile)?\.{space}\.(?:(?P<vector>v[24])\.)?(?P<type>[a-z]\d+)\s+"
    before_address = r"(?:[^;\[]*, )?)" if op == "ld" else r")"
    rest = "(?P<after>[^;]*;)?" if becomes is _dropped else ""
    return Kind(name, head + before_address + r"\[(?P<address>[^\]]+)\]" + rest, becomes)


SHUFFLE = r"(shfl\.sync\.bfly\.b32\s+[^,]+, %r\d+), (%r\d+)(, %r\d+), (%r\d+);"

LEVEL0 = [
    Kind("barrier dropped", r"bar\.sync\s+\d+;", _dropped),
    Kind("shuffle mask short of a lane", SHUFFLE, lambda m: f"{m[1]}, {m[2]}{m[3]}, 0x7fffffff;"),
    Kind("shuffle over no distance", SHUFFLE, lambda m: f"{m[1]}, 0{m[3]}, {m[4]};"),
    access("load one further", "ld", "global", _moved),
    access("store one further", "st", "global", _moved),
    access("shared load one further", "ld", "shared", _moved),
    access("shared store one further", "st", "shared", _moved),
    access("store dropped", "st", "global", _dropped),
    access("shared store dropped", "st", "shared", _dropped),
    Kind("guard dropped", r"@!?%p\d+ bra\s+[\w$]+;", _dropped),
    Kind("guard turned", r"@(!?)(%p\d+ bra\s+[\w$]+;)", lambda m: f"@{'' if m[1] else '!'}{m[2]}"),
]

INIT = r"(mbarrier\.init\.shared::cta\.b64 \[%r\d+\]), (%r\d+);"
EXPECT = r"(mbarrier\.arrive\.expect_tx\.shared::cta\.b64 _, \[%r\d+\], )(%r\d+);"
TRY_WAIT = r"mbarrier\.try_wait\.parity\.shared::cta\.b64"

LEVEL1 = [
    Kind("fence.proxy.async dropped", r"fence\.proxy\.async\.shared::cta;", _dropped),
    Kind("fence.mbarrier_init dropped", r"fence\.mbarrier_init\.release\.cluster;", _dropped),
    Kind("mbarrier not initialised", INIT, _dropped),
    Kind(
        "mbarrier for one arrival more",
        INIT,
        lambda m: f"add.s32 {m[2]}, {m[2]}, 1; {m[0]} add.s32 {m[2]}, {m[2]}, -1;",
    ),
    Kind(
        "transaction 16 bytes short",
        EXPECT,
        lambda m: f"add.s32 {m[2]}, {m[2]}, -16; {m[0]} add.s32 {m[2]}, {m[2]}, 16;",
    ),
    Kind(
        "transaction 16 bytes long",
        EXPECT,
        lambda m: f"add.s32 {m[2]}, {m[2]}, 16; {m[0]} add.s32 {m[2]}, {m[2]}, -16;",
    ),
    Kind("arrival dropped", r"mbarrier\.arrive\.shared::cta\.b64\s+_, \[%r\d+\];", _dropped),
    Kind("remote arrival dropped", r"mbarrier\.arrive\.shared::cluster\.b64\s+_, \[\w+\];", _dropped),
    Kind(
        "parity turned",
        rf"({TRY_WAIT} \w+, \[%r\d+\], )(%r\d+)((?:, %r\d+)?;)",
        lambda m: f"xor.b32 {m[2]}, {m[2]}, 1; {m[0]} xor.b32 {m[2]}, {m[2]}, 1;",
    ),
    Kind("wait left out", rf"{TRY_WAIT} (\w+), [^;]*;\s*(?=@\w+ bra)", lambda m: f"setp.eq.u32 {m[1]}, 0, 0; "),
    Kind(
        "multicast to the first block alone",
        r"(\.multicast::cluster\.L2::cache_hint [^;]*), %rs\d+, (%rd\d+;)",
        lambda m: f"{m[1]}, 1, {m[2]}",
    ),
    Kind("named barrier dropped", r"bar\.sync %r\d+, %r\d+;", _dropped),
    Kind("named barrier for 256", r"bar\.sync (%r\d+), %r\d+;", lambda m: f"bar.sync {m[1]}, 256;"),
    Kind("barrier dropped", r"bar\.sync\s+\d+;", _dropped),
    Kind("cluster wait dropped", r"barrier\.cluster\.wait\.aligned;", _dropped),
    Kind("wgmma dropped", r"wgmma\.mma_async[^;]*;", _dropped),
    Kind(
        "wgmma adds where it should not, or the other way round",
        r"setp\.ne\.b32 (\w+, %r\d+, 0;)(?=\s*wgmma)",
        lambda m: f"setp.eq.b32 {m[1]}",
    ),
    Kind(
        "descriptor one further",
        r"(wgmma\.mma_async[^;]*\},\s*)(%rd\d+)(,\s*%rd\d+,[^;]*;)",
        lambda m: f"add.s64 {m[2]}, {m[2]}, 2; {m[0]} add.s64 {m[2]}, {m[2]}, -2;",
    ),
    Kind("wgmma.fence dropped", r"wgmma\.fence\.sync\.aligned;", _dropped),
    Kind("wgmma.commit_group dropped", r"wgmma\.commit_group\.sync\.aligned;", _dropped),
    Kind(
        "wgmma waits for one group less",
        r"(wgmma\.wait_group\.sync\.aligned) (\d);",
        lambda m: f"{m[1]} {int(m[2]) + 1};",
    ),
    Kind("wgmma.wait_group dropped", r"wgmma\.wait_group\.sync\.aligned \d;", _dropped),
    Kind("TMA commit dropped", r"cp\.async\.bulk\.commit_group;", _dropped),
    Kind("TMA wait dropped", r"cp\.async\.bulk\.wait_group\.read \d;", _dropped),
    Kind(
        "TMA waits for one group less",
        r"(cp\.async\.bulk\.wait_group\.read) (\d);",
        lambda m: f"{m[1]} {int(m[2]) + 1};",
    ),
    Kind("TMA store dropped", r"cp\.async\.bulk\.tensor\.3d\.global[^;]*;", _dropped),
    Kind("matrix stored 16 bytes further", r"(stmatrix\.sync[^\[]*\[)(%r\d+)\]", lambda m: f"{m[1]}{m[2]}+16]"),
    Kind(
        "arrivals at the first block alone",
        r"(mapa\.shared::cluster\.u32\s+\w+, %r\d+), %r\d+;",
        lambda m: f"{m[1]}, 0;",
    ),
    Kind("shuffle over another distance", SHUFFLE, lambda m: f"{m[1]}, 16{m[3]}, {m[4]};"),
    access("store one further", "st", "global", _moved),
]


def mutations(source: Source, kinds: list[Kind], each: int, seed: int = 0) -> Iterator[Mutation]:
    """Up to ``each`` edits of every kind, at places drawn from all that there are."""
    for kind in kinds:
        places = list(re.finditer(kind.pattern, source.body))
        chosen = random.Random(f"{seed} {source.name} {kind.name}").sample(range(len(places)), min(each, len(places)))
        for number in sorted(chosen):
            found = places[number]
            new = kind.becomes(found)
            if new is not None:
                body = source.body[: found.start()] + new + source.body[found.end() :]
                yield Mutation(kind.name, source.name, " ".join(found[0].split()), number, body)
