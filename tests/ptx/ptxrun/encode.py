"""A parsed kernel handed to the machine."""

from __future__ import annotations

import ctypes
import re
import struct

from ptxrun.parse import SPECIALS, Kernel, PtxError, split_list

REGISTER, CONSTANT, ADDRESS, ABSOLUTE, SINK = range(5)


def load(library: ctypes.CDLL, kernel: Kernel) -> None:
    """Makes ``kernel`` known to the machine. An instruction that it has not is a :class:`PtxError` with its name."""
    name = kernel.name.encode()
    program = ctypes.c_void_p(library.ptx_program(name))
    try:
        _Encoder(library, program, kernel).all()
    except PtxError:
        library.ptx_forget(name)
        raise


class _Encoder:
    def __init__(self, library: ctypes.CDLL, program: ctypes.c_void_p, kernel: Kernel) -> None:
        self.library, self.program, self.kernel = library, program, kernel
        self.symbols = {p.name: p.offset for p in kernel.parameters} | kernel.shared
        used = set(re.findall(r"%?[\w$]+(?:\.[xyz])?", " ".join(s.text for s in kernel.code)))
        used |= {name.split(".")[0] for name in used - SPECIALS}
        self.registers: dict[str, int] = {}
        for register, width in kernel.registers.items():
            if register in used:
                self.registers[register] = library.ptx_register(program, register.encode(), width)

    def all(self) -> None:
        for parameter in self.kernel.parameters:
            self.library.ptx_parameter(self.program, parameter.offset, parameter.size)
        self.library.ptx_shared_bytes(self.program, self.kernel.shared_bytes)
        for statement in self.kernel.code:
            self.statement(statement)

    def statement(self, s) -> None:
        guard, negated, target = -1, s.guard.startswith("!"), -1
        if s.guard:
            guard = self.register(s.guard.lstrip("!"), s.text)
        operands: list[tuple[int, int, int]] = []
        counts: list[int] = []
        if s.opcode in ("bra", "bra.uni"):
            if s.operands[0] not in self.kernel.labels:
                raise PtxError(f"no label {s.operands[0]}: {s.text}")
            target = self.kernel.labels[s.operands[0]]
        else:
            for operand in s.operands:
                encoded = list(self.operand(operand, s.text))
                operands += encoded
                counts.append(len(encoded))
        flat = [_signed(number) for one in operands for number in one]
        failed = self.library.ptx_instruction(
            self.program,
            s.opcode.encode(),
            s.text.encode(),
            guard,
            int(negated),
            target,
            (ctypes.c_int64 * len(flat))(*flat),
            len(operands),
            (ctypes.c_int * len(counts))(*counts),
            len(counts),
        )
        if failed:
            raise PtxError(self.library.ptx_fault().decode())

    def register(self, name: str, text: str) -> int:
        if name not in self.registers:
            raise PtxError(f"no register {name}: {text}")
        return self.registers[name]

    def operand(self, o: str, text: str):
        """The numbers that stand for an operand; for a list or a pair, of each of its parts."""
        if o.startswith("{"):
            for part in split_list(o[1:-1]):
                yield from self.operand(part, text)
        elif "|" in o:
            for part in o.split("|"):
                yield from self.operand(part.strip(), text)
        elif o.startswith("["):
            # An address, and behind it what else stands in the brackets: a TMA's coordinates.
            first, *others = split_list(o[1:-1])
            yield self.address(first.replace(" ", ""), text)
            for part in others:
                yield from self.operand(part, text)
        elif o == "_":
            yield SINK, -1, 0
        elif o in self.registers:
            yield REGISTER, self.registers[o], 0
        else:
            yield CONSTANT, -1, self.constant(o, text)

    def address(self, text: str, whole: str) -> tuple[int, int, int]:
        base, offset = re.fullmatch(r"(%?[\w$]+?)(?:\+(-?\d+))?", text).groups()
        if base in self.symbols:
            return ABSOLUTE, -1, self.symbols[base] + int(offset or 0)
        if base.isdigit():
            return ABSOLUTE, -1, int(base) + int(offset or 0)
        return ADDRESS, self.register(base, whole), int(offset or 0)

    def constant(self, o: str, text: str) -> int:
        symbol = re.fullmatch(r"([\w$]+)(?:\+(-?\d+))?", o)
        if symbol and symbol[1] in self.symbols:
            return self.symbols[symbol[1]] + int(symbol[2] or 0)
        if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", o) or re.fullmatch(r"0[dD][0-9a-fA-F]{16}", o):
            return int(o[2:], 16)
        try:
            return int(o.removesuffix("U"), 0)
        except ValueError:
            raise PtxError(f"unknown operand {o}: {text}") from None


def _signed(bits: int) -> int:
    """64 bits as C's int64_t has them."""
    return (bits + 2**63) % 2**64 - 2**63


def float_bits(value: float) -> str:
    """A float32 constant as PTX writes it."""
    return f"0f{struct.unpack('<I', struct.pack('<f', value))[0]:08X}"
