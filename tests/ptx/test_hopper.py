"""What Hopper adds, instruction by instruction: clusters, tensor transfers, wgmma and stmatrix, and their checks."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from ptxrun.machine import Fault, Machine
from ptxrun.small import run

# A tensor map as tests/ptx/ptxrun/machine/tensor_map.h has it.
TENSOR_MAP = np.dtype(
    [
        ("magic", "u8"),
        ("address", "u8"),
        ("rank", "u4"),
        ("swizzle", "u4"),
        ("strides", "u8", 4),
        ("dims", "u4", 5),
        ("box", "u2", 5),
        ("element_bytes", "u2"),
        ("rest", "u1", 40),
    ]
)
SCHEDULES = [{}, {"random": True, "seed": 1}, {"late": True}, {"late": True, "random": True, "seed": 2}]


@pytest.fixture
def on_device(machine: Machine) -> Iterator[Callable[[np.ndarray], np.uint64]]:
    """From arrays to their device addresses."""
    addresses, kept = [], []

    def address_of(array: np.ndarray) -> np.uint64:
        kept.append(array)
        addresses.append(
            machine.library.ptx_allocate(
                b"a tensor", ctypes.c_uint64(array.nbytes), ctypes.c_void_p(array.ctypes.data), 1
            )
        )
        return np.uint64(addresses[-1])

    yield address_of
    for address in addresses:
        machine.library.ptx_free(ctypes.c_uint64(address))


def tensor_map(address: np.uint64, shape: tuple[int, int], box: tuple[int, int], swizzle: int) -> np.ndarray:
    """Of a matrix of 16-bit numbers, as a tensor of three dimensions; ``swizzle`` 3 is that of rows of 128 bytes."""
    rows, columns = shape
    of_map = np.zeros(1, TENSOR_MAP)
    of_map["magic"], of_map["address"], of_map["rank"] = 0x70616D2D72747074, address, 3
    of_map["swizzle"], of_map["element_bytes"] = swizzle, 2
    of_map["strides"][0, :2] = 2 * columns, 2 * columns * rows
    of_map["dims"][0, :3] = columns, rows, 1
    of_map["box"][0, :3] = box[1], box[0], 1
    return of_map


def refused(machine: Machine, match: str, arguments: list, body: str, schedules: list[dict] = SCHEDULES, **how) -> None:
    for schedule in schedules:
        with machine.with_options(**schedule), pytest.raises(Fault, match=match):
            run(machine, arguments, body, **how)


def without(body: str, part: str) -> str:
    assert body.count(part) == 1, part
    return body.replace(part, "")


# ------------------------------------------------------------------------------------------- clusters

RENDEZVOUS = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;\n"
WAIT = "AGAIN: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r1], 0; @!%p3 bra AGAIN;\n"
FENCE = "@%p1 fence.mbarrier_init.release.cluster;\n"
SIGNAL = (
    "mov.u32 %r1, buffer; setp.eq.u32 %p1, %t, 0; @%p1 mbarrier.init.shared::cta.b64 [%r1], 1;\n"
    f"{FENCE}{RENDEZVOUS}"
    "mov.u32 %r2, %cluster_ctarank; setp.eq.u32 %p2, %r2, 0; @%p2 bra WAITS;\n"
    "@%p1 st.global.u32 [%base0], 7;\n"
    "mapa.shared::cluster.u32 %r3, %r1, 0; @%p1 mbarrier.arrive.shared::cluster.b64 _, [%r3]; bra END;\n"
    f"WAITS: {WAIT} ld.global.u32 %r4, [%base0]; @%p1 st.global.u32 [%base0+4], %r4; END:"
)
CLUSTER = {"grid": 2, "cluster": 2, "shared": ".shared .align 8 .b8 buffer[8];"}


def test_a_block_signals_another(machine: Machine) -> None:
    for schedule in [*SCHEDULES, {"random": True, "uneven": True, "seed": 3}]:
        words = np.zeros(2, np.uint32)
        with machine.with_options(**schedule):
            run(machine, [words], SIGNAL, **CLUSTER)
        assert words.tolist() == [7, 7]
        words = np.zeros(2, np.uint32)
        with machine.with_options(**schedule):  # the fence is enough for the mbarrier
            run(machine, [words], SIGNAL.replace("arrive.aligned", "arrive.relaxed.aligned"), **CLUSTER)
        assert words.tolist() == [7, 7]
    words = np.zeros(2, np.uint32)
    refused(machine, "a race|a block that has left", [words], without(SIGNAL, WAIT), **CLUSTER)
    refused(machine, "no fence.mbarrier_init has made visible", [words], without(SIGNAL, FENCE), **CLUSTER)
    refused(machine, "nothing has made visible|no mbarrier has been", [words], without(SIGNAL, RENDEZVOUS), **CLUSTER)
    refused(
        machine, "a block that the cluster has not", [words], SIGNAL.replace("%r1, 0; @%p1", "%r1, 2; @%p1"), **CLUSTER
    )
    refused(machine, "no whole number of clusters", [words], SIGNAL, **(CLUSTER | {"grid": 3}))


def test_blocks_that_leave_before_the_others_need_them(machine: Machine) -> None:
    """Found where one block runs ahead."""
    leaves = SIGNAL.replace("@%p2 bra WAITS", "@%p2 bra END")
    faults = 0
    for seed in range(8):
        with machine.with_options(random=True, uneven=True, seed=seed):
            try:
                run(machine, [np.zeros(2, np.uint32)], leaves, **CLUSTER)
            except Fault as fault:
                assert "a block that has left" in str(fault)
                faults += 1
    assert 0 < faults < 8


def test_warps_that_fall_far_behind_others_of_their_block(machine: Machine) -> None:
    """Block 0 waits for a signal of block 1's fifth warp, and not for the one that its first warp gives much sooner."""
    body = (
        "mov.u32 %r1, buffer; add.s32 %r2, %r1, 8; mov.u32 %r5, 0; setp.eq.u32 %p1, %t, 0;\n"
        "@%p1 mbarrier.init.shared::cta.b64 [%r1], 1; @%p1 mbarrier.init.shared::cta.b64 [%r2], 1;\n"
        f"{FENCE}{RENDEZVOUS}"
        "mov.u32 %r4, %cluster_ctarank; setp.eq.u32 %p2, %r4, 0; @%p2 bra AGAIN;\n"
        "mapa.shared::cluster.u32 %r3, %r2, 0; @%p1 mbarrier.arrive.shared::cluster.b64 _, [%r3];\n"
        "setp.ne.u32 %p1, %t, 128; @%p1 bra END;\n"
        "MORE: add.s32 %r5, %r5, 1; setp.lt.u32 %p1, %r5, 300; @%p1 bra MORE;\n"
        "mapa.shared::cluster.u32 %r3, %r1, 0; mbarrier.arrive.shared::cluster.b64 _, [%r3]; bra END;\n"
        f"{WAIT} END:"
    )
    how = CLUSTER | {"block": 160, "shared": ".shared .align 8 .b8 buffer[16];"}
    faults = 0
    for seed in range(16):
        with machine.with_options(random=True, uneven=True, seed=seed):
            try:
                run(machine, [], body, **how)
            except Fault as fault:
                assert "a block that has left" in str(fault)
                faults += 1
    assert 0 < faults < 16


def test_half_an_arrival_at_the_cluster_barrier(machine: Machine) -> None:
    body = f"mov.u32 %r2, %cluster_ctarank; setp.eq.u32 %p2, %r2, 0; @%p2 bra END; {RENDEZVOUS} END:"
    refused(machine, "deadlock.*waits for the cluster", [], body, **CLUSTER)
    refused(machine, "without having arrived", [], "barrier.cluster.wait.aligned;", **CLUSTER)


# ------------------------------------------------------------------------------------------- tensor transfers

LOAD = "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
# %r1: the buffer, whose mbarrier lies at 32768 (%r2). Thread 0 expects {bytes} and starts {loads}; all wait.
LOADS = (
    ".reg .b32 %zero; mov.u32 %zero, 0; mov.u64 %rd9, 0; mov.u32 %r1, buffer; add.s32 %r2, %r1, 32768;\n"
    "setp.ne.u32 %p1, %t, 0; @%p1 bra READY; mbarrier.init.shared::cta.b64 [%r2], 1;\n"
    "fence.mbarrier_init.release.cluster; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], BYTES; LOAD\n"
    "READY: bar.sync 0;\n"
)
WAIT_FOR_LOADS = "AGAIN: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r2], 0; @!%p3 bra AGAIN;\n"
BUFFER = ".shared .align 1024 .b8 buffer[32776];"


@pytest.mark.parametrize("swizzle", [0, 3])
def test_tensor_loads(machine: Machine, on_device: Callable, swizzle: int) -> None:
    """A box that hangs over the tensor's edges: zeros there; 16-byte pieces in their swizzled places."""
    tensor = np.arange(1, 13 * 72 + 1, dtype=np.uint16).reshape(13, 72)
    of_map = on_device(tensor_map(on_device(tensor), tensor.shape, (8, 64), swizzle))
    load = f"mov.u32 %r3, 16; mov.u32 %r4, 8; {LOAD} [%r1], [%base0, {{%r3, %r4, %zero}}], [%r2], %rd9;"
    body = LOADS.replace("LOAD", load).replace("BYTES", "1024") + WAIT_FOR_LOADS
    body += "mul.wide.u32 %rd1, %t, 4; add.s64 %rd2, %base1, %rd1; shl.b32 %r5, %t, 2; add.s32 %r6, %r5, %r1;\n"
    body += "".join(f"ld.shared.u32 %r7, [%r6+{at}]; st.global.u32 [%rd2+{at}], %r7;\n" for at in range(0, 1024, 128))
    expected = np.pad(tensor, ((0, 3), (0, 8)))[8:16, 16:80].reshape(8, 8, 8)
    if swizzle:
        expected = np.stack([expected[row][np.arange(8) ^ row] for row in range(8)])
    for schedule in SCHEDULES:
        found = np.zeros(512, np.uint16)
        with machine.with_options(**schedule):
            run(machine, [of_map, found], body, shared=BUFFER)
        assert (found == expected.reshape(-1)).all()
    arguments = [of_map, np.zeros(512, np.uint16)]
    late = [schedule for schedule in SCHEDULES if schedule.get("late")]
    refused(machine, "nothing has written|a race", arguments, without(body, WAIT_FOR_LOADS), late, shared=BUFFER)
    refused(machine, "deadlock", arguments, body.replace("_, [%r2], 1024", "_, [%r2], 1040"), shared=BUFFER)
    refused(
        machine, "off a 128-byte boundary", arguments, body.replace(f"{LOAD} [%r1]", f"{LOAD} [%r1+64]"), shared=BUFFER
    )
    refused(machine, "no fence", arguments, without(body, "fence.mbarrier_init.release.cluster; "), shared=BUFFER)
    forgotten = LOADS.replace("LOAD", load).replace("BYTES", "1024")
    refused(machine, "a transfer to a block that has left", arguments, forgotten, late, shared=BUFFER)


MULTICAST = LOAD.replace(".L2", ".multicast::cluster.L2")
TO_BOTH = (
    "mov.u64 %rd9, 0; mov.u32 %r1, buffer; add.s32 %r2, %r1, 32768; mov.u32 %r5, %cluster_ctarank; mov.u32 %r3, 0;\n"
    "setp.ne.u32 %p1, %t, 0; @%p1 bra READY; mbarrier.init.shared::cta.b64 [%r2], 1;\n"
    "fence.mbarrier_init.release.cluster; mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 1024;\n"
    f"READY: {RENDEZVOUS}"
    "setp.eq.u32 %p2, %r5, 0; setp.eq.u32 %p1, %t, 0; and.pred %p1, %p1, %p2; mov.u16 %rs1, 3;\n"
    f"@%p1 {MULTICAST} [%r1], [%base0, {{%r3, %r3, %r3}}], [%r2], %rs1, %rd9;\n{WAIT_FOR_LOADS}"
    "mad.lo.s32 %r6, %r5, 256, %t; mul.wide.u32 %rd1, %r6, 4; add.s64 %rd2, %base1, %rd1;\n"
    "shl.b32 %r7, %t, 2; add.s32 %r8, %r7, %r1;\n"
    + "".join(f"ld.shared.u32 %r9, [%r8+{at}]; st.global.u32 [%rd2+{at}], %r9;\n" for at in range(0, 1024, 128))
)


def test_a_tensor_load_to_both_blocks_of_a_cluster(machine: Machine, on_device: Callable) -> None:
    tensor = np.arange(512, dtype=np.uint16).reshape(8, 64)
    of_map = on_device(tensor_map(on_device(tensor), tensor.shape, tensor.shape, 0))
    how = CLUSTER | {"shared": BUFFER}
    for schedule in [*SCHEDULES, {"late": True, "random": True, "uneven": True, "seed": 4}]:
        found = np.zeros((2, 512), np.uint16)
        with machine.with_options(**schedule):
            run(machine, [of_map, found], TO_BOTH, **how)
        assert (found == tensor.reshape(1, -1)).all()
    arguments = [of_map, np.zeros((2, 512), np.uint16)]
    refused(machine, "deadlock", arguments, TO_BOTH.replace("mov.u16 %rs1, 3", "mov.u16 %rs1, 1"), **how)
    refused(machine, "blocks that are not there", arguments, TO_BOTH.replace("%rs1, 3", "%rs1, 7"), **how)
    refused(machine, "no mbarrier has been|made visible", arguments, without(TO_BOTH, RENDEZVOUS), **how)


STORE = "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%base0, {%r3, %r4, %zero}], [%r1];\n"
STORES = (
    ".reg .b32 %zero; mov.u32 %zero, 0; mov.u32 %r1, buffer; shl.b32 %r5, %t, 2; add.s32 %r6, %r5, %r1;\n"
    + "".join(f"add.s32 %r7, %r5, {at}; st.shared.u32 [%r6+{at}], %r7;\n" for at in range(0, 1024, 128))
    + "fence.proxy.async.shared::cta; bar.sync 0; setp.ne.u32 %p1, %t, 0; @%p1 bra END;\n"
    f"mov.u32 %r3, 16; mov.u32 %r4, 8; {STORE}"
    "cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0; END:"
)


def test_tensor_stores(machine: Machine, on_device: Callable) -> None:
    """What hangs over the tensor's edges is not written."""
    tensor = np.zeros((13, 72), np.uint16)
    of_map = on_device(tensor_map(on_device(tensor), tensor.shape, (8, 64), 0))
    box = np.arange(0, 1024, 4, dtype=np.uint32).view(np.uint16).reshape(8, 64)
    expected = np.zeros_like(tensor)
    expected[8:, 16:] = box[:5, :56]
    for schedule in SCHEDULES:
        tensor[:] = 0
        with machine.with_options(**schedule):
            run(machine, [of_map], STORES, shared=BUFFER)
        assert (tensor == expected).all()
    refused(machine, "no fence", [of_map], without(STORES, "fence.proxy.async.shared::cta; "), shared=BUFFER)
    refused(machine, "never committed", [of_map], without(STORES, "cp.async.bulk.commit_group; "), shared=BUFFER)
    refused(machine, "nobody waited for", [of_map], without(STORES, "cp.async.bulk.wait_group.read 0; "), shared=BUFFER)


# ------------------------------------------------------------------------------------------- wgmma and stmatrix

WGMMA = "wgmma.mma_async.sync.aligned.m64n192k16.f32.{kind}.{kind} {{{d}}}, %rd1, %rd2, {adds}, 1, 1, 0, 0;\n"
# Descriptors of the tiles at the buffer's start and 8192 bytes on: 1024 bytes from 8 rows to the next, swizzled.
DESCRIPTORS = (
    "shr.u32 %r3, %r1, 4; cvt.u64.u32 %rd3, %r3; or.b64 %rd1, %rd3, 0x4000004000000000; add.s64 %rd2, %rd1, 512;\n"
    "setp.ne.u32 %p4, %t, %t; setp.eq.u32 %p5, %t, %t; wgmma.fence.sync.aligned;\n"
)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_wgmma(machine: Machine, on_device: Callable, kind: str) -> None:
    """[64, 64] times [192, 64] transposed, in four steps, from what two transfers have brought."""
    r = np.random.default_rng(0)
    sources = [r.integers(-9, 10, (rows, 64)).astype(np.float32) for rows in (64, 192)]
    # Small integers are exact in both types.
    tiles = [
        (s.view(np.uint32) >> 16).astype(np.uint16) if kind == "bf16" else s.astype(np.float16).view(np.uint16)
        for s in sources
    ]
    maps = [on_device(tensor_map(on_device(tile), tile.shape, tile.shape, 3)) for tile in tiles]
    loads = (
        f"{LOAD} [%r1], [%base0, {{%zero, %zero, %zero}}], [%r2], %rd9; add.s32 %r3, %r1, 8192;\n"
        f"{LOAD} [%r3], [%base1, {{%zero, %zero, %zero}}], [%r2], %rd9;"
    )
    d = ", ".join(f"%d{i}" for i in range(96))
    step = "add.s64 %rd1, %rd1, 2; add.s64 %rd2, %rd2, 2;\n"
    body = ".reg .f32 %d<96>;\n" + LOADS.replace("LOAD", loads).replace("BYTES", "32768") + WAIT_FOR_LOADS
    body += DESCRIPTORS + step.join(WGMMA.format(kind=kind, d=d, adds="%p4" if k == 0 else "%p5") for k in range(4))
    body += "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;\n"
    body += "mul.wide.u32 %rd5, %t, 384; add.s64 %rd6, %base2, %rd5;\n"
    body += "".join(f"st.global.f32 [%rd6+{4 * i}], %d{i};\n" for i in range(96))

    t, i = np.arange(128)[:, None], np.arange(96)[None]
    row, column = 16 * (t // 32) + t % 32 // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * (t % 4) + i % 2
    expected = (sources[0] @ sources[1].T)[row, column]
    for schedule in SCHEDULES:
        found = np.zeros((128, 96), np.float32)
        with machine.with_options(**schedule):
            run(machine, [*maps, found], body, shared=BUFFER, block=128)
        assert (found == expected).all()
    arguments, how = [*maps, np.zeros((128, 96), np.float32)], {"shared": BUFFER, "block": 128}
    refused(machine, "wgmma.fence", arguments, without(body, "wgmma.fence.sync.aligned;"), **how)
    refused(machine, "wgmma", arguments, without(body, "wgmma.wait_group.sync.aligned 0;"), **how)
    refused(machine, "wgmma", arguments, without(body, "wgmma.commit_group.sync.aligned; "), **how)
    refused(machine, "nothing has written", arguments, body.replace("}, %rd1, %rd2, %p4", "}, %rd1, %rd2, %p5"), **how)
    refused(
        machine, "not agree|differ", arguments, body.replace("add.s64 %rd2, %rd1, 512", "cvt.u64.u32 %rd2, %t"), **how
    )


def test_stmatrix(machine: Machine) -> None:
    """Lane 8 m + r gives where row r of matrix m goes: here to 16 (r + 8 (m ^ 1))."""
    found = np.zeros(256, np.uint16)
    body = (
        "mov.u32 %r1, buffer; xor.b32 %r2, %t, 8; shl.b32 %r3, %r2, 4; add.s32 %r4, %r1, %r3;\n"
        + "".join(f"mad.lo.s32 %r{5 + m}, %t, 0x20002, {0x10000 + 0x400040 * m};\n" for m in range(4))
        + "stmatrix.sync.aligned.x4.m8n8.shared.b16 [%r4], {%r5, %r6, %r7, %r8}; bar.warp.sync -1;\n"
        "xor.b32 %r12, %t, 1; shl.b32 %r9, %r12, 2; add.s32 %r10, %r9, %r1; mul.wide.u32 %rd1, %r12, 4;\n"
        "add.s64 %rd2, %base0, %rd1;\n"
        + "".join(f"ld.shared.u32 %r11, [%r10+{at}]; st.global.u32 [%rd2+{at}], %r11;\n" for at in range(0, 512, 128))
    )
    run(machine, [found], body, shared=BUFFER)
    # Numbers of 16 bits count through matrix after matrix.
    assert (found.reshape(4, 64) == np.arange(256).reshape(4, 64)[[1, 0, 3, 2]]).all()
    refused(machine, "off a 16-byte boundary", [found], body.replace("%r1, %r3;", "%r1, %r2;"), shared=BUFFER)
    refused(machine, "a race|nothing has written", [found], without(body, "bar.warp.sync -1;"), shared=BUFFER)
