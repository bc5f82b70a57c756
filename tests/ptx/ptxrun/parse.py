"""PTX text to kernels: their parameters, shared memory, registers, and instructions with scoped names resolved.

Only the grammar that nvcc writes: a statement ends with a semicolon, a brace where a statement could begin opens or
closes a scope (inline assembly has scopes of its own for registers and labels), any other brace holds a list.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
# Registers that the machine sets.
SPECIALS = {
    *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid", "cluster_ctaid") for axis in "xyz"),
    "%laneid",
    "%cluster_ctarank",
}


class PtxError(Exception):
    """PTX that cannot be run: what, and where."""


@dataclass
class Parameter:
    name: str
    offset: int
    size: int


@dataclass
class Statement:
    """One instruction as written: its guard ("p", "!p" or ""), opcode, and operands, which name registers uniquely."""

    guard: str
    opcode: str
    operands: list[str]
    text: str


@dataclass
class Kernel:
    name: str
    parameters: list[Parameter]
    shared: dict[str, int]  # symbol -> offset
    shared_bytes: int
    registers: dict[str, int]  # name -> width in bytes, 0 for a predicate
    code: list[Statement]
    labels: dict[str, int] = field(default_factory=dict)  # name -> index in code

    def symbol(self, name: str) -> int | None:
        """A symbol's address: of a parameter in the space of parameters, of a variable in shared memory."""
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter.offset
        return self.shared.get(name)


def width_of(kind: str) -> int:
    """Bytes of a type such as u32 or bf16; a predicate's are 0."""
    return 0 if kind == "pred" else SIZES[re.search(r"\d+$", kind)[0]]


def align(offset: int, to: int) -> int:
    return (offset + to - 1) // to * to


def split_list(text: str) -> list[str]:
    """At the commas outside of brackets and braces."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "[{(":
            depth += 1
        elif c in "]})":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*", "", re.sub(r"/\*.*?\*/", "", text, flags=re.S))


@dataclass
class Source:
    """A kernel's text: what stands between its parentheses, its braces, and the module's own shared variables."""

    name: str
    parameters: str
    body: str
    variables: str


def kernels_of(text: str) -> dict[str, Source]:
    """The text of every kernel of a module, by name."""
    text = without_comments(text)
    variables = []
    found: dict[str, Source] = {}
    end = 0
    for entry in re.finditer(r"\.entry\s+([\w$]+)\s*\(", text):
        variables += re.findall(r"(?:\.extern\s+)?(\.shared\b[^;]*);", text[end : entry.start()])
        close = text.index(")", entry.end())
        start = text.index("{", close)
        depth = 0
        for brace in re.finditer(r"[{}]", text[start:]):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                end = start + brace.end()
                break
        found[entry[1]] = Source(entry[1], text[entry.end() : close], text[start + 1 : end - 1], "")
    for source in found.values():
        source.variables = ";\n".join([*variables, ""])
    return found


def statements_of(body: str):
    """Scopes' braces, labels with their colon, and statements without their semicolon."""
    at = re.compile(r"\s*(?:([{}])|([\w$]+):(?!:)|([^;]*);)", re.S)
    position = 0
    while body[position:].strip():
        found = at.match(body, position)
        if found is None:
            raise PtxError(f"cannot read: {body[position : position + 80].strip()!r}")
        position = found.end()
        if found[1]:
            yield found[1]
        elif found[2]:
            yield found[2] + ":"
        else:
            yield " ".join(found[3].split())


def parse(source: Source) -> Kernel:
    """Reads a kernel; names of inner scopes get a suffix, so that every register and label has a name of its own."""
    kernel = Kernel(source.name, _parameters(source.parameters), {}, 0, {}, [])
    scopes: list[dict[str, str]] = []
    opened = 0
    body = source.body
    # Dynamic shared memory lies behind all that has a size; a module's variables are every kernel's, if it names them.
    variables = list(statements_of(source.variables))
    for statement in sorted(variables, key=lambda s: s.endswith("[]")):
        name = re.search(r"([\w$]+)(?:\[\d*\])?$", statement)[1]
        if not statement.endswith("[]") and name in body:
            _shared_variable(kernel, statement)

    def renamed(text: str) -> str:
        for names in reversed(scopes):
            for name, new in names.items():
                text = re.sub(rf"(?<![\w$%.]){re.escape(name)}(?![\w$])", new, text)
        return text

    pending: list[tuple[str, str]] = []
    lines = list(statements_of(body))
    for number, line in enumerate(lines):
        if line == "{":
            opened += 1
            scopes.append(_names_of_scope(lines, number, opened))
        elif line == "}":
            scopes.pop()
        elif line.endswith(":"):
            pending.append(("label", renamed(line[:-1])))
        elif line.startswith(".reg"):
            kind, names = re.match(r"\.reg\s*\.(\w+)\s+(.*)", line).groups()
            for name in split_list(names):
                many = re.fullmatch(r"(%?[\w$]+)<(\d+)>", name)
                for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [renamed(name)]:
                    kernel.registers[one] = width_of(kind)
        elif line.startswith(".shared"):
            _shared_variable(kernel, line)
        elif line.startswith((".pragma", ".loc", ".file", ".local")) or not line:
            if line.startswith(".local"):
                raise PtxError(f"{source.name}: local memory, which these kernels are not to need: {line}")
        else:
            pending.append(("code", renamed(line)))
    for statement in variables:
        if statement.endswith("[]"):
            name, alignment = re.search(r"([\w$]+)\[\]$", statement)[1], re.search(r"\.align\s+(\d+)", statement)
            if name in body:
                # A device starts it on the strictest boundary that TMA's swizzled tiles ask for.
                kernel.shared_bytes = align(kernel.shared_bytes, max(int(alignment[1]), 1024))
                kernel.shared[name] = kernel.shared_bytes
    for kind, text in pending:
        if kind == "label":
            kernel.labels[text] = len(kernel.code)
        else:
            kernel.code.append(_instruction(text))
    for name in SPECIALS:
        if any(re.search(rf"{re.escape(name)}(?![\w.])", s.text) for s in kernel.code if name in s.text):
            kernel.registers[name] = 4
    return kernel


def _names_of_scope(lines: list[str], start: int, number: int) -> dict[str, str]:
    """What the scope that opens at ``start`` declares itself: registers, and labels."""
    depth, names = 0, {}
    for line in lines[start:]:
        depth += {"{": 1, "}": -1}.get(line, 0)
        if depth == 0:
            break
        if depth != 1:
            continue
        if line.startswith(".reg"):
            declared = split_list(re.match(r"\.reg\s*\.\w+\s+(.*)", line)[1])
        else:
            declared = [line[:-1]] if line.endswith(":") else []
        names |= {name: f"{name}_in{number}" for name in declared}
    return names


def _parameters(text: str) -> list[Parameter]:
    parameters, offset = [], 0
    for one in split_list(" ".join(text.split())):
        alignment, kind, name, count = re.match(
            r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?$", one
        ).groups()
        offset = align(offset, int(alignment or width_of(kind)))
        parameters.append(Parameter(name, offset, width_of(kind) * int(count or 1)))
        offset += parameters[-1].size
    return parameters


def _shared_variable(kernel: Kernel, text: str) -> None:
    alignment, kind, name, count = re.match(
        r"\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?$", text
    ).groups()
    offset = align(kernel.shared_bytes, int(alignment or width_of(kind)))
    kernel.shared[name] = offset
    kernel.shared_bytes = offset + width_of(kind) * int(count or 1)


def _instruction(text: str) -> Statement:
    guard, opcode, rest = re.match(r"(?:@(!?%?[\w$]+)\s+)?([\w.:]+)\s*(.*)$", text, re.S).groups()
    return Statement(guard or "", opcode, split_list(rest), text)
