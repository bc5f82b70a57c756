"""Small kernels for the tests of single instructions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from ptxrun.machine import Machine

_numbers = itertools.count()
# PTX's type of a numpy type, for loads and stores.
MEMORY = {1: "u8", 2: "u16", 4: "u32", 8: "u64"}
HEADER = ".version 8.4\n.target sm_90a\n.address_size 64\n"


def register_type(size: int) -> str:
    return f"b{8 * max(size, 2)}"


def kernel(parameters: int, body: str, *, shared: str = "") -> tuple[str, str]:
    """A module with one kernel of 64-bit parameters p0, p1, ...; its name and text. %t is the thread's number."""
    name = f"small_{next(_numbers)}"
    listed = ", ".join(f".param .u64 p{i}" for i in range(parameters))
    loads = "".join(f"ld.param.u64 %base{i}, [p{i}];\n" for i in range(parameters))
    return name, (
        f"{HEADER}.visible .entry {name}({listed})\n{{\n{shared}\n.reg .b64 %base<{parameters or 1}>;\n"
        f".reg .b32 %t; .reg .b32 %r<32>; .reg .b64 %rd<32>; .reg .b16 %rs<32>; .reg .f32 %f<32>; .reg .f64 %fd<32>;\n"
        f".reg .pred %p<32>;\n{loads}mov.u32 %t, %tid.x;\n{body}\nret;\n}}\n"
    )


def run(machine: Machine, arguments: Sequence[np.ndarray], body: str, *, shared: str = "", **how) -> None:
    name, text = kernel(len(arguments), body, shared=shared)
    machine.add(text)
    machine.load(name)
    machine.run(name, list(arguments), **how)


def address(register: str, base: int, size: int) -> str:
    return f"mul.wide.u32 {register}, %t, {size};\nadd.s64 {register}, {register}, %base{base};\n"


def lanewise(
    machine: Machine, instruction: str, inputs: Sequence[np.ndarray], output: np.dtype, *, types: str = ""
) -> np.ndarray:
    """One instruction, of which each lane takes its element of ``inputs``: %d is the result, %a, %b, %c the operands.

    ``types`` gives the registers' own, where they are not those of the arrays' sizes: of the result, then operands.
    """
    n = len(inputs[0])
    padded = [np.concatenate([x, np.repeat(x[-1:], -n % 32)]) for x in inputs]
    result = np.zeros(len(padded[0]), output)
    declared = types.split() or [register_type(np.dtype(output).itemsize), *(register_type(x.itemsize) for x in inputs)]
    body = "".join(f".reg .{kind} %{name};\n" for kind, name in zip(declared, "dabc", strict=False))
    for i, (x, name) in enumerate(zip(padded, "abc", strict=False)):
        body += address(f"%rd{i}", i + 1, x.itemsize) + f"ld.global.{MEMORY[x.itemsize]} %{name}, [%rd{i}];\n"
    body += f"{instruction}\n" + address("%rd9", 0, result.itemsize)
    body += f"st.global.{MEMORY[result.itemsize]} [%rd9], %d;\n"
    body = body.replace("%t,", "%all,").replace("mul.wide.u32 %rd", "mul.wide.u32 %rd")
    prologue = ".reg .b32 %all;\nmov.u32 %all, %ctaid.x;\nmad.lo.s32 %all, %all, 32, %t;\n"
    run(machine, [result, *padded], prologue + body, grid=len(result) // 32)
    return result[:n]
