"""Every instruction that the kernels use, against what the PTX ISA says of it."""

from __future__ import annotations

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from ptxrun.machine import Fault, Machine
from ptxrun.parse import PtxError
from ptxrun.small import lanewise, run

RNG = np.random.default_rng(0)
FLOATS = np.concatenate(
    [
        np.array(
            [0.0, -0.0, 1, -1, 0.5, 1.5, 2.5, -2.5, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1.1754944e-38, 3.4e38]
        ),
        RNG.standard_normal(200) * 10.0 ** RNG.integers(-38, 38, 200),
    ]
).astype(np.float32)
DOUBLES = np.concatenate([FLOATS.astype(np.float64), RNG.standard_normal(100) * 10.0 ** RNG.integers(-300, 300, 100)])
CANONICAL = 0x7FFFFFFF


def bits(x: np.ndarray) -> np.ndarray:
    return x.view({2: np.uint16, 4: np.uint32, 8: np.uint64}[x.itemsize])


def same(found: np.ndarray, expected: np.ndarray) -> None:
    """Bit by bit; a NaN of float32 is the canonical one, of float64 any."""
    nan = np.isnan(expected)
    if expected.dtype == np.float32:
        assert (bits(found)[nan] == CANONICAL).all()
    else:
        assert np.isnan(found[nan]).all()
    different = (bits(found) != bits(expected)) & ~nan
    assert not different.any(), (found[different][:5], expected[different][:5])


def pairs(values: np.ndarray, n: int = 2000) -> list[np.ndarray]:
    """Every pair of the special values, and random ones."""
    special = np.array(list(itertools.product(values[:15], repeat=2)), values.dtype).T
    random = values[RNG.integers(0, len(values), (2, n))]
    return [np.ascontiguousarray(np.concatenate(x)) for x in zip(special, random, strict=True)]


def signed(dtype: type) -> np.ndarray:
    info = np.iinfo(dtype)
    edges = np.array([0, 1, 2, 3, info.max, info.min, info.min + 1, info.max - 1, 7, 31, 32, 33, 63, 64, 65], dtype)
    return np.concatenate([edges, RNG.integers(info.min, info.max, 100, dtype)])


# ------------------------------------------------------------------------------------------- floating point


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("op", ["add", "sub", "mul", "div.rn", "add.rn", "mul.rn"])
def test_arithmetic_rounds_to_nearest(machine: Machine, kind: str, op: str) -> None:
    a, b = pairs(FLOATS if kind == "f32" else DOUBLES)
    found = lanewise(machine, f"{op}.{kind} %d, %a, %b;", [a, b], a.dtype)
    function = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}[op.split(".")[0]]
    with np.errstate(all="ignore"):
        same(found, function(a, b))


def exactly_rounded(x: Fraction, mode: str, dtype: type) -> np.floating:
    """A fraction in float32 or float64: found among the neighbours of a first guess."""
    guess = dtype(float(x))
    below = guess if Fraction(float(guess)) <= x else np.nextafter(guess, dtype(-np.inf))
    above = below if Fraction(float(below)) == x else np.nextafter(below, dtype(np.inf))
    if mode == "rm":
        return below
    if mode == "rp":
        return above
    if mode == "rz":
        return below if x > 0 else above
    gap = x - Fraction(float(below)), Fraction(float(above)) - x
    if gap[0] != gap[1]:
        return below if gap[0] < gap[1] else above
    return below if int(bits(np.array([below]))[0]) % 2 == 0 else above


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("mode", ["rn", "rm", "rp", "rz"])
def test_fma_rounds_once_and_as_it_is_told(machine: Machine, mode: str, dtype: type) -> None:
    """Against exact fractions; among the cases, sums that cancel and ties that a product rounded before would miss."""
    n = 300
    a, b = (RNG.standard_normal((2, n)) * 4.0 ** RNG.integers(-3, 3, (2, n))).astype(dtype)
    c = (RNG.standard_normal(n) * 4.0 ** RNG.integers(-12, 4, n)).astype(dtype)
    c[: n // 3] = -(a * b)[: n // 3]
    half = np.finfo(dtype).eps
    a[:3], b[:3], c[:3] = 1 + half, 1 - half, [1, -1, half]
    found = lanewise(machine, f"fma.{mode}.{'f32' if dtype == np.float32 else 'f64'} %d, %a, %b, %c;", [a, b, c], dtype)
    for i in range(n):
        exact = Fraction(float(a[i])) * Fraction(float(b[i])) + Fraction(float(c[i]))
        if exact != 0:
            assert found[i] == exactly_rounded(exact, mode, dtype), (a[i], b[i], c[i])
        else:
            # An exact zero from terms of two signs is +0, and -0 where rounded down.
            assert found[i] == 0 and np.signbit(found[i]) == (mode == "rm")


@pytest.mark.parametrize("mode", ["rz", "rm", "rp"])
def test_sums_rounded_in_a_direction(machine: Machine, mode: str) -> None:
    a, b = (RNG.standard_normal((2, 300)) * 8.0 ** RNG.integers(-6, 6, (2, 300))).astype(np.float32)
    found = lanewise(machine, f"add.{mode}.f32 %d, %a, %b;", [a, b], np.float32)
    for i in range(300):
        assert found[i] == exactly_rounded(Fraction(float(a[i])) + Fraction(float(b[i])), mode, np.float32)
    # What comes after it is rounded to nearest again.
    same(lanewise(machine, "add.f32 %d, %a, %b;", [a, b], np.float32), a + b)


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_min_and_max_of_nans_and_zeros(machine: Machine, kind: str) -> None:
    """A NaN loses against a number, two give the canonical one, and -0 is below +0."""
    a, b = pairs(FLOATS if kind == "f32" else DOUBLES)
    least = np.where(np.isnan(a), b, np.where(np.isnan(b), a, np.minimum(a, b)))
    most = np.where(np.isnan(a), b, np.where(np.isnan(b), a, np.maximum(a, b)))
    zeros = (a == 0) & (b == 0)
    least = np.where(zeros, np.where(np.signbit(a) | np.signbit(b), -0.0, 0.0).astype(a.dtype), least)
    most = np.where(zeros, np.where(np.signbit(a) & np.signbit(b), -0.0, 0.0).astype(a.dtype), most)
    same(lanewise(machine, f"min.{kind} %d, %a, %b;", [a, b], a.dtype), least)
    same(lanewise(machine, f"max.{kind} %d, %a, %b;", [a, b], a.dtype), most)


def test_signs(machine: Machine) -> None:
    """abs, neg and copysign move bits; copysign takes the sign of its first operand."""
    a, b = pairs(FLOATS)
    number = ~np.isnan(a) & ~np.isnan(b)
    for instruction, expected in (
        ("abs.f32 %d, %a;", np.abs(a)),
        ("neg.f32 %d, %a;", -a),
        ("copysign.f32 %d, %a, %b;", np.copysign(b, a)),
    ):
        found = lanewise(machine, instruction, [a, b], np.float32)
        assert (bits(found) == bits(expected))[number].all()


def test_approximations_are_inside_what_ptx_allows(machine: Machine) -> None:
    """ex2.approx.ftz: 2 ulp; rcp.approx.ftz: 1 ulp; with subnormal numbers as zeros."""
    x = np.concatenate([FLOATS, RNG.uniform(-130, 130, 1000).astype(np.float32)])
    flushed = np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)
    with np.errstate(all="ignore"):
        exact = {"ex2": np.exp2(flushed.astype(np.float64)), "rcp": 1 / flushed.astype(np.float64)}
    for perturb in (False, True):
        for name, ulps in (("ex2", 2), ("rcp", 1)):
            with machine.with_options(perturb=perturb, seed=3):
                found = lanewise(machine, f"{name}.approx.ftz.f32 %d, %a;", [x], np.float32)
            with np.errstate(over="ignore"):
                rounded = exact[name].astype(np.float32)
            expected = np.where(
                np.abs(rounded) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), rounded), rounded
            )
            normal = np.isfinite(expected) & (expected != 0)
            distance = np.abs(bits(found).astype(np.int64) - bits(expected).astype(np.int64))
            assert (distance[normal] <= ulps).all()
            assert distance[normal].any() == perturb
            same(found[~normal & (np.abs(exact[name]) > 1.2e-38)], expected[~normal & (np.abs(exact[name]) > 1.2e-38)])
    whole = np.arange(-126, 127).astype(np.float32)
    with machine.with_options(perturb=True):
        same(lanewise(machine, "ex2.approx.ftz.f32 %d, %a;", [whole], np.float32), np.exp2(whole))


def test_the_gross_reciprocal_of_doubles(machine: Machine) -> None:
    """The result's lower 32 bits are zeros; the upper ones are right to 20 bits or so."""
    x = DOUBLES[np.isfinite(DOUBLES) & (np.abs(DOUBLES) > 1e-300) & (np.abs(DOUBLES) < 1e300)]
    found = lanewise(machine, "rcp.approx.ftz.f64 %d, %a;", [x], np.float64)
    assert not (bits(found) & np.uint64(0xFFFFFFFF)).any()
    assert (np.abs(found * x - 1) < 2.0**-18).all()
    odd = np.array([0.0, -0.0, np.inf, -np.inf])
    same(lanewise(machine, "rcp.approx.ftz.f64 %d, %a;", [odd], np.float64), np.array([np.inf, -np.inf, 0.0, -0.0]))


# ------------------------------------------------------------------------------------------- conversions


def test_to_16_bits_and_back(machine: Machine) -> None:
    """Ties to even, overflow to infinity, subnormal numbers of float16, NaN to 0x7fff."""
    every = np.arange(65536, dtype=np.uint16)
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        wide = torch.from_numpy(every.view(np.int16)).view(dtype).float().numpy()
        same(lanewise(machine, f"cvt.f32.{name} %d, %a;", [every], np.float32), wide)
        # All numbers, all that lie half way between two, and their neighbours.
        finite = np.unique(wide[np.isfinite(wide)])
        middle = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
        x = np.concatenate(
            [finite, middle, np.nextafter(middle, np.float32(9e9)), np.nextafter(middle, np.float32(-9e9)), FLOATS]
        )
        found = lanewise(machine, f"cvt.rn.{name}.f32 %d, %a;", [x], np.uint16)
        expected = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)
        assert (found == np.where(np.isnan(x), 0x7FFF, expected)).all()


def test_two_bfloat16_at_once(machine: Machine) -> None:
    """The first source is the upper half."""
    a, b = pairs(FLOATS)
    found = lanewise(machine, "cvt.rn.bf16x2.f32 %d, %a, %b;", [a, b], np.uint32)
    upper = lanewise(machine, "cvt.rn.bf16.f32 %d, %a;", [a], np.uint16)
    lower = lanewise(machine, "cvt.rn.bf16.f32 %d, %a;", [b], np.uint16)
    assert (found == upper.astype(np.uint32) << 16 | lower).all()


def test_conversions_of_floats(machine: Machine) -> None:
    x, d = FLOATS, DOUBLES
    with np.errstate(all="ignore"):
        same(lanewise(machine, "cvt.rn.f32.f64 %d, %a;", [d], np.float32), d.astype(np.float32))
        same(lanewise(machine, "cvt.f64.f32 %d, %a;", [x], np.float64), x.astype(np.float64))
    same(lanewise(machine, "cvt.rni.f32.f32 %d, %a;", [x], np.float32), np.rint(x))
    same(lanewise(machine, "cvt.rzi.f32.f32 %d, %a;", [x], np.float32), np.trunc(x))
    saturated = np.where(x > 0, np.minimum(x, 1), 0).astype(np.float32)
    same(lanewise(machine, "cvt.sat.f32.f32 %d, %a;", [x], np.float32), saturated)


def test_conversions_of_integers(machine: Machine) -> None:
    """Extended by the source's own sign; cut without a word."""
    i, u = signed(np.int32), signed(np.int32).view(np.uint32)
    wide = signed(np.int64)
    assert (lanewise(machine, "cvt.s64.s32 %d, %a;", [i], np.int64) == i.astype(np.int64)).all()
    assert (lanewise(machine, "cvt.u64.u32 %d, %a;", [u], np.uint64) == u.astype(np.uint64)).all()
    assert (lanewise(machine, "cvt.u32.u64 %d, %a;", [wide], np.uint32) == wide.astype(np.uint32)).all()
    for name, from_dtype, dtype in (
        ("f32.s32", np.int32, np.float32),
        ("f32.s64", np.int64, np.float32),
        ("f64.s64", np.int64, np.float64),
    ):
        x = signed(from_dtype)
        same(lanewise(machine, f"cvt.rn.{name} %d, %a;", [x], dtype), x.astype(dtype))


# ------------------------------------------------------------------------------------------- integers and logic


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_integers_wrap_around(machine: Machine, dtype: type) -> None:
    n = np.dtype(dtype).itemsize * 8
    a, b = pairs(signed(dtype))
    c = RNG.permutation(a)
    u, v = a.view(f"u{n // 8}"), b.view(f"u{n // 8}")
    with np.errstate(all="ignore"):
        for instruction, expected in (
            (f"add.s{n} %d, %a, %b;", a + b),
            (f"sub.s{n} %d, %a, %b;", a - b),
            (f"mul.lo.s{n} %d, %a, %b;", a * b),
            (f"mad.lo.s{n} %d, %a, %b, %c;", a * b + c),
            (f"neg.s{n} %d, %a;", -a),
            (f"min.s{n} %d, %a, %b;", np.minimum(a, b)),
            (f"max.s{n} %d, %a, %b;", np.maximum(a, b)),
            (f"and.b{n} %d, %a, %b;", a & b),
            (f"or.b{n} %d, %a, %b;", a | b),
            (f"xor.b{n} %d, %a, %b;", a ^ b),
            (f"not.b{n} %d, %a;", ~a),
        ):
            assert (lanewise(machine, instruction, [a, b, c], dtype) == expected).all(), instruction
        divisor = np.where(v == 0, 1, v).astype(v.dtype)
        assert (lanewise(machine, f"div.u{n} %d, %a, %b;", [u, divisor], u.dtype) == u // divisor).all()
    with pytest.raises(Fault, match="division by zero"):
        lanewise(machine, f"div.u{n} %d, %a, %b;", [u, np.zeros_like(u)], u.dtype)


def test_wide_and_high_products(machine: Machine) -> None:
    a, b = pairs(signed(np.int32))
    wide = a.astype(np.int64) * b.astype(np.int64)
    assert (lanewise(machine, "mul.wide.s32 %d, %a, %b;", [a, b], np.int64) == wide).all()
    u, v = a.view(np.uint32), b.view(np.uint32)
    unsigned = u.astype(np.uint64) * v.astype(np.uint64)
    assert (lanewise(machine, "mul.wide.u32 %d, %a, %b;", [u, v], np.uint64) == unsigned).all()
    x, y = (p.view(np.uint64) for p in pairs(signed(np.int64)))
    high = np.array([int(p) * int(q) >> 64 for p, q in zip(x, y, strict=True)], np.uint64)
    assert (lanewise(machine, "mul.hi.u64 %d, %a, %b;", [x, y], np.uint64) == high).all()
    count = np.array([int(p).bit_count() for p in u], np.uint32)
    assert (lanewise(machine, "popc.b32 %d, %a;", [u], np.uint32) == count).all()


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_shifts_are_clamped(machine: Machine, dtype: type) -> None:
    """By more than the width: zeros, or the sign of a signed number."""
    n = np.dtype(dtype).itemsize * 8
    a = np.repeat(signed(dtype), 8)
    by = np.tile(np.array([0, 1, n - 1, n, n + 1, 255, 2**31, 2**32 - 1], np.uint32), len(a) // 8)
    left = [int(x) << int(s) & 2**n - 1 if s < n else 0 for x, s in zip(a, by, strict=True)]
    right = [int(x) >> min(int(s), n - 1) for x, s in zip(a, by, strict=True)]
    unsigned = [(int(x) % 2**n) >> int(s) if s < n else 0 for x, s in zip(a, by, strict=True)]
    u = f"u{n // 8}"
    assert (lanewise(machine, f"shl.b{n} %d, %a, %b;", [a, by], u) == np.array(left, u)).all()
    assert (lanewise(machine, f"shr.s{n} %d, %a, %b;", [a, by], dtype) == np.array(right, dtype)).all()
    assert (lanewise(machine, f"shr.u{n} %d, %a, %b;", [a, by], u) == np.array(unsigned, u)).all()


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_comparisons_of_floats(machine: Machine, kind: str) -> None:
    """Ordered ones are false of a NaN, ne among them; unordered ones are true."""
    a, b = pairs(FLOATS if kind == "f32" else DOUBLES)
    nan = np.isnan(a) | np.isnan(b)
    ordered = {"eq": a == b, "ne": a != b, "lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b}
    expected = {name: value & ~nan for name, value in ordered.items()}
    expected |= {f"{name}u": value | nan for name, value in ordered.items()} | {"num": ~nan, "nan": nan}
    for name, value in expected.items():
        body = f"setp.{name}.{kind} %p1, %a, %b; selp.b32 %d, 1, 0, %p1;"
        assert (lanewise(machine, body, [a, b], np.uint32) == value).all(), name


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.int64])
def test_comparisons_of_integers(machine: Machine, dtype: type) -> None:
    n = np.dtype(dtype).itemsize * 8
    a, b = pairs(signed(dtype))
    for sign, x, y in (("s", a, b), ("u", a.view(f"u{n // 8}"), b.view(f"u{n // 8}"))):
        for name, value in {"eq": x == y, "ne": x != y, "lt": x < y, "le": x <= y, "gt": x > y, "ge": x >= y}.items():
            body = f"setp.{name}.{sign}{n} %p1, %a, %b; selp.b32 %d, 1, 0, %p1;"
            assert (lanewise(machine, body, [a, b], np.uint32) == value).all(), (name, sign)


def test_predicates(machine: Machine) -> None:
    """Guards, their negation, logic, and a result that keeps its value where the guard does not hold."""
    a = np.arange(32, dtype=np.uint32)
    body = (
        "setp.lt.u32 %p1, %a, 8; setp.gt.u32 %p2, %a, 3; and.pred %p3, %p1, %p2; or.pred %p4, %p1, %p2;\n"
        "xor.pred %p5, %p1, %p2; not.pred %p6, %p1; mov.u32 %d, 0;\n"
        "@%p3 add.s32 %d, %d, 1; @!%p1 add.s32 %d, %d, 2; @%p5 add.s32 %d, %d, 4; @%p6 add.s32 %d, %d, 8;\n"
        "@%p4 add.s32 %d, %d, 16;"
    )
    one, two = a < 8, a > 3
    expected = (one & two) + 2 * ~one + 4 * (one ^ two) + 8 * ~one + 16 * (one | two)
    assert (lanewise(machine, body, [a], np.uint32) == expected).all()


# ------------------------------------------------------------------------------------------- moves and memory


def test_packs(machine: Machine) -> None:
    """In braces, the first is the lowest."""
    x = RNG.integers(0, 2**63, 64, np.uint64)
    swapped = lanewise(machine, "mov.b64 {%r1, %r2}, %a; mov.b64 %d, {%r2, %r1};", [x], np.uint64)
    assert (swapped == (x << np.uint64(32) | x >> np.uint64(32))).all()
    y = x.astype(np.uint32)
    upper = lanewise(machine, "mov.b32 {%rs1, %rs2}, %a; mov.b32 %d, {0, %rs1};", [y], np.uint32)
    assert (upper == y << 16).all()


@pytest.mark.parametrize(("kind", "parts", "size"), [("u32", 2, 4), ("u32", 4, 4), ("f64", 2, 8), ("u16", 4, 2)])
def test_vectors(machine: Machine, kind: str, parts: int, size: int) -> None:
    dtype = {2: np.uint16, 4: np.uint32, 8: np.uint64}[size]
    x = RNG.integers(0, 2**15, 32 * parts, dtype)
    to = np.zeros_like(x)
    prefix = {2: "%rs", 4: "%r", 8: "%fd"}[size]
    registers = [f"{prefix}{i}" for i in range(parts)]
    body = (
        f"mul.wide.u32 %rd1, %t, {parts * size}; add.s64 %rd2, %base0, %rd1; add.s64 %rd3, %base1, %rd1;\n"
        f"ld.global.v{parts}.{kind} {{{', '.join(registers)}}}, [%rd2];\n"
        f"st.global.v{parts}.{kind} [%rd3], {{{', '.join(reversed(registers))}}};"
    )
    run(machine, [x, to], body, unknown=(1,))
    assert (to.reshape(32, parts) == x.reshape(32, parts)[:, ::-1]).all()


def test_loads_extend(machine: Machine) -> None:
    """By zeros, or by the sign of the type loaded."""
    x = np.arange(224, 256, dtype=np.uint8)
    found = np.zeros((2, 32), np.uint32)
    body = (
        "cvt.u64.u32 %rd1, %t; add.s64 %rd2, %base0, %rd1; ld.global.u8 %r1, [%rd2]; ld.global.s8 %r2, [%rd2];\n"
        "mul.wide.u32 %rd3, %t, 4; add.s64 %rd4, %base1, %rd3; "
        "st.global.u32 [%rd4], %r1; st.global.u32 [%rd4+128], %r2;"
    )
    run(machine, [x, found], body)
    assert (found[0] == x).all() and (found[1].view(np.int32) == x.view(np.int8)).all()


# ------------------------------------------------------------------------------------------- between lanes


def shuffled(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """The PTX ISA's own pseudocode."""
    clamp, segment = c & 31, c >> 8 & 31
    most = (lane & segment) | (clamp & ~segment)
    least = lane & segment
    if mode == "up":
        j, p = lane - b, lane - b >= most
    elif mode == "down":
        j, p = lane + b, lane + b <= most
    elif mode == "bfly":
        j, p = lane ^ b, lane ^ b <= most
    else:
        j = least | (b & ~segment)
        p = j <= most
    return (j if p else lane), p


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("c", [31, 0, 0x1C03, 0x1807, 0x181F, 0x0000, 15])
def test_shuffles(machine: Machine, mode: str, c: int) -> None:
    a = RNG.integers(0, 2**32, 32, np.uint32)
    for b in (0, 1, 2, 5, 16, 31, 33):
        body = f"shfl.sync.{mode}.b32 %d|%p1, %a, {b}, {c}, -1; @!%p1 xor.b32 %d, %d, 0x5a5a5a5a;"
        found = lanewise(machine, body, [a], np.uint32)
        for lane in range(32):
            j, inside = shuffled(mode, lane, b & 31, c)
            assert found[lane] == a[j] ^ (0 if inside else 0x5A5A5A5A), (mode, lane, b, c)


def test_shuffles_and_votes_of_a_part_of_the_warp(machine: Machine) -> None:
    """Of the lanes that the mask names, wherever the others are."""
    a = np.arange(32, dtype=np.uint32)
    body = (
        "mov.u32 %d, 0; setp.lt.u32 %p1, %a, 16; @%p1 bra LOW;\n"
        "shfl.sync.bfly.b32 %d, %a, 1, 31, 0xffff0000; bra END;\n"
        "LOW: setp.gt.u32 %p2, %a, 11; vote.sync.ballot.b32 %d, %p2, 0x0000ffff;\nEND:"
    )
    expected = np.where(a < 16, 0xF000, a ^ 1)
    assert (lanewise(machine, body, [a], np.uint32) == expected).all()
    with machine.with_options(random=True, seed=5):
        assert (lanewise(machine, body, [a], np.uint32) == expected).all()


def test_elect(machine: Machine) -> None:
    """One lane, whichever; and all learn which."""
    a = np.arange(32, dtype=np.uint32)
    for random in (False, True):
        with machine.with_options(random=random):
            body = "elect.sync %d|%p1, -1; @%p1 add.s32 %d, %d, 100;"
            found = lanewise(machine, body, [a], np.uint32)
        leader = int(found.min())
        assert found[leader] == leader + 100 and (np.delete(found, leader) == leader).all()


def test_barriers_order_shared_memory(machine: Machine) -> None:
    """Named and for the whole block, with warps in any order."""
    to = np.zeros(128, np.uint32)
    body = (
        "shl.b32 %r1, %t, 2; mov.u32 %r2, buffer; add.s32 %r3, %r1, %r2; st.shared.u32 [%r3], %t; bar.sync 0;\n"
        "xor.b32 %r4, %r1, 508; add.s32 %r5, %r4, %r2; ld.shared.u32 %r6, [%r5]; bar.sync 3, 128;\n"
        "st.shared.u32 [%r3], %r6; mul.wide.u32 %rd1, %t, 4; add.s64 %rd2, %base0, %rd1; st.global.u32 [%rd2], %r6;"
    )
    for seed in range(5):
        with machine.with_options(random=seed > 0, seed=seed):
            run(machine, [to], body, shared=".shared .align 4 .b8 buffer[512];", block=128, unknown=(0,))
        assert (to == 127 - np.arange(128)).all()
        to[:] = 0


# ------------------------------------------------------------------------------------------- what there is not


@pytest.mark.parametrize(
    "instruction", ["sin.approx.f32 %f1, %f1;", "fma.rn.ftz.f32 %f1, %f1, %f1, %f1;", "bfind.u32 %r1, %r1;"]
)
def test_an_unknown_instruction_is_an_error_by_name(machine: Machine, instruction: str) -> None:
    with pytest.raises(PtxError, match=f"unknown instruction {instruction.split()[0]}"):
        run(machine, [], instruction)
