"""Every check of the machine, by a kernel that does what is checked for, and one beside it that does not."""

from __future__ import annotations

import numpy as np
import pytest
from ptxrun.machine import Fault, Machine
from ptxrun.small import run

SHARED = ".shared .align 16 .b8 buffer[512];"
MINE = "mul.wide.u32 %rd1, %t, 4; add.s64 %rd2, %base0, %rd1;\n"  # [%rd2]: the thread's element of argument 0
SLOT = "shl.b32 %r1, %t, 2; mov.u32 %r2, buffer; add.s32 %r3, %r1, %r2;\n"  # [%r3]: the thread's of the buffer


def refused(machine: Machine, match: str, arguments: list[np.ndarray], body: str, **how) -> None:
    """In order and at random; and nobody else's memory is harmed."""
    for random in (False, True):
        with machine.with_options(random=random, seed=1), pytest.raises(Fault, match=match):
            run(machine, [a.copy() for a in arguments], body, **how)


def words(n: int) -> np.ndarray:
    return np.arange(n, dtype=np.uint32)


@pytest.mark.parametrize("offset", [-4, 128, 126])
@pytest.mark.parametrize("access", ["ld.global.u16 %rs1, [{}];", "st.global.u16 [{}], 1;"])
def test_out_of_bounds_by_allocation(machine: Machine, offset: int, access: str) -> None:
    """By one byte, with another allocation behind; and just inside."""
    body = access.format(f"%base0+{offset}")
    if offset == 126:
        run(machine, [words(32), words(32)], body, block=1)
    else:
        refused(machine, "out of bounds of argument 0, 128 bytes", [words(32), words(32)], body, block=1)


def test_an_address_of_nothing(machine: Machine) -> None:
    refused(machine, "in no allocation", [], "mov.u64 %rd1, 0; ld.global.u32 %r1, [%rd1];")
    refused(machine, "out of bounds of shared memory", [], "mov.u32 %r1, 4; ld.shared.u32 %r2, [%r1];")


def test_unwritten_bytes(machine: Machine) -> None:
    """Of global memory that no launch has written, of shared memory, and of registers."""
    refused(machine, "nothing has written", [words(32)], f"{MINE} ld.global.u32 %r1, [%rd2];", unknown=(0,))
    refused(machine, "shared memory that nothing has written", [], f"{SLOT} ld.shared.u32 %r4, [%r3];", shared=SHARED)
    half = f"{SLOT} cvt.u16.u32 %rs1, %t; st.shared.u16 [%r3], %rs1; ld.shared.u32 %r4, [%r3];"
    refused(machine, "shared memory that nothing has written", [], half, shared=SHARED)
    refused(machine, "register %r5 is read before it is written", [], "add.s32 %r4, %r5, 1;")
    some = "setp.lt.u32 %p1, %t, 31; @%p1 mov.u32 %r5, 1; add.s32 %r4, %r5, 1;"
    refused(machine, "register %r5 is read before it is written", [], some)
    run(machine, [words(32)], f"{MINE} st.global.u32 [%rd2], %t; ld.global.u32 %r1, [%rd2];", unknown=(0,))


@pytest.mark.parametrize(
    "access", ["ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%base0+8];", "st.global.u64 [%base0+4], 1;"]
)
def test_misaligned_vectors(machine: Machine, access: str) -> None:
    refused(machine, "a misaligned access", [words(64)], access, block=1)


EXCHANGE = f"{SLOT} st.shared.u32 [%r3], %t; {{}} xor.b32 %r4, %r3, 128; ld.shared.u32 %r5, [%r4];"


def test_races_in_shared_memory(machine: Machine) -> None:
    """Between warps, without the barrier; also in the order in which nothing goes wrong."""
    refused(machine, "a race in shared memory|nothing has written", [], EXCHANGE.format(""), shared=SHARED, block=64)
    for seed in range(3):
        with machine.with_options(random=seed > 0, seed=seed):
            run(machine, [], EXCHANGE.format("bar.sync 0;"), shared=SHARED, block=64)
    one_warp = f"{SLOT} st.shared.u32 [%r3], %t; {{}} xor.b32 %r4, %r3, 4; ld.shared.u32 %r5, [%r4];"
    refused(machine, "a race in shared memory", [], one_warp.format(""), shared=SHARED)
    run(machine, [], one_warp.format("bar.warp.sync -1;"), shared=SHARED)
    read_then_write = (
        f"{SLOT} st.shared.u32 [%r3], %t; bar.sync 0; xor.b32 %r4, %r3, 128; ld.shared.u32 %r5, [%r4]; {{}}\n"
        "st.shared.u32 [%r3], %r5;"
    )
    refused(machine, "a race in shared memory", [], read_then_write.format(""), shared=SHARED, block=64)
    run(machine, [], read_then_write.format("bar.sync 0;"), shared=SHARED, block=64)
    everybody_reads = (
        f"{SLOT} {{}} ld.shared.u32 %r5, [buffer]; bar.sync 0; setp.eq.u32 %p1, %t, 0; @%p1 st.shared.u32 [buffer], 2;"
    )
    start = "setp.eq.u32 %p2, %t, 0; @%p2 st.shared.u32 [buffer], 1; bar.sync 0;"
    run(machine, [], everybody_reads.format(start), shared=SHARED, block=64)
    refused(
        machine,
        "another thread's read",
        [],
        everybody_reads.format(start).replace("bar.sync 0; setp.eq.u32 %p1", "setp.eq.u32 %p1"),
        shared=SHARED,
        block=64,
    )


def test_races_in_global_memory(machine: Machine) -> None:
    """Between threads of a block, and between blocks, which nothing orders; not between launches."""
    refused(machine, "a race in argument 0", [words(1)], "st.global.u32 [%base0], %t;")
    refused(machine, "another block's write", [words(1)], "st.global.u32 [%base0], 7;", grid=2, block=1)
    read_and_write = (
        "ld.global.u32 %r1, [%base0]; mov.u32 %r2, %ctaid.x; setp.eq.u32 %p1, %r2, 1; @%p1 st.global.u32 [%base0], 1;"
    )
    refused(machine, "another block's (read|write)", [words(1)], read_and_write, grid=2, block=1)
    run(machine, [words(1)], "ld.global.u32 %r1, [%base0];", grid=4)
    # Neighbouring halves of a word are no race.
    run(
        machine,
        [words(16)],
        "mul.wide.u32 %rd1, %t, 2; add.s64 %rd2, %base0, %rd1; cvt.u16.u32 %rs1, %t; st.global.u16 [%rd2], %rs1;",
    )


def test_barriers_that_not_all_reach(machine: Machine) -> None:
    leaves = "setp.gt.u32 %p1, %t, 31; @%p1 bra END; bar.sync 0; END:"
    refused(machine, "deadlock.*waits at a barrier", [], leaves, block=64)
    half = "setp.gt.u32 %p1, %t, 15; @%p1 bra END; bar.sync 0; END:"
    refused(machine, "lanes that have left|deadlock", [], half, block=32)
    refused(
        machine,
        "for 96 threads, and for 64|for 64 threads, and for 96|deadlock",
        [],
        ("setp.gt.u32 %p1, %t, 31; mov.u32 %r1, 64; @%p1 mov.u32 %r1, 96; bar.sync 1, %r1;"),
        block=64,
    )
    refused(machine, "no whole number of warps", [], "bar.sync 1, 33;", block=64)
    refused(machine, "there are 16", [], "bar.sync 16;")


def test_shuffles_that_not_all_reach(machine: Machine) -> None:
    shuffle = "shfl.sync.bfly.b32 %r1, %t, 1, 31, {};"
    refused(machine, "leaves out", [], shuffle.format("0x7fffffff"))
    refused(
        machine,
        "deadlock.*waits for other lanes|have left",
        [],
        (f"setp.eq.u32 %p1, %t, 9; @%p1 bra END; {shuffle.format(-1)} END:"),
    )
    refused(machine, "predicate passes it by", [], f"setp.ne.u32 %p1, %t, 9; @%p1 {shuffle.format(-1)}")
    refused(
        machine,
        "which is not here",
        [],
        ("setp.gt.u32 %p1, %t, 15; @%p1 bra END; shfl.sync.idx.b32 %r1, %t, 20, 31, 0xffff; END:"),
    )
    refused(machine, "differs between the lanes", [], "shl.b32 %r2, %t, 1; shfl.sync.bfly.b32 %r1, %t, 1, 31, %r2;")
    refused(
        machine,
        "deadlock",
        [],
        (
            "setp.gt.u32 %p1, %t, 15; @%p1 bra OTHER; vote.sync.ballot.b32 %r1, %p1, -1; bra END;\n"
            "OTHER: vote.sync.ballot.b32 %r1, %p1, -1; END:"
        ),
    )


def test_loops_without_end(machine: Machine) -> None:
    with machine.with_options(most_instructions=1000), pytest.raises(Fault, match="as if it would never end"):
        run(machine, [], "AGAIN: bra AGAIN;")


# ------------------------------------------------------------------------------------------- mbarriers

BARRIER = ".shared .align 8 .b8 buffer[512];"
INIT = (
    "setp.eq.u32 %p1, %t, 0; mov.u32 %r2, buffer; @%p1 mbarrier.init.shared::cta.b64 [%r2], {}; bar.sync 0;\n"
    "shl.b32 %r1, %t, 2; add.s32 %r3, %r1, %r2;\n"
)
WAIT = "AGAIN: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r2], {}; @!%p3 bra AGAIN;\n"


def test_mbarriers_order_what_came_before_the_arrivals(machine: Machine) -> None:
    body = (
        INIT + "st.shared.u32 [%r3+64], %t; mbarrier.arrive.shared::cta.b64 _, [%r2];\n" + "{wait}"
        "xor.b32 %r4, %r1, 128; add.s32 %r5, %r4, %r2; ld.shared.u32 %r6, [%r5+64];"
    )
    for seed in range(4):
        with machine.with_options(random=seed > 0, seed=seed):
            run(machine, [], body.format(64, wait=WAIT.format(0)), shared=BARRIER, block=64)
    refused(machine, "a race|nothing has written", [], body.format(64, wait=""), shared=BARRIER, block=64)
    # The phase before has the other parity, and counts as complete.
    refused(machine, "a race|nothing has written", [], body.format(64, wait=WAIT.format(1)), shared=BARRIER, block=64)
    refused(
        machine, "deadlock.*waits at an mbarrier", [], body.format(65, wait=WAIT.format(0)), shared=BARRIER, block=64
    )
    # 63: the phase is complete before the last has arrived.
    refused(machine, "a race|nothing has written", [], body.format(63, wait=WAIT.format(0)), shared=BARRIER, block=64)


def test_mbarriers_that_are_none(machine: Machine) -> None:
    refused(
        machine,
        "no mbarrier has been initialised",
        [],
        ("mov.u32 %r2, buffer; mbarrier.arrive.shared::cta.b64 _, [%r2];"),
        shared=BARRIER,
    )
    wrong = INIT.format(32) + "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 16;" + WAIT.format(0)
    refused(machine, "deadlock", [], wrong, shared=BARRIER)
