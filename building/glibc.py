"""Links a library so that it asks for no younger glibc and libstdc++ than torch's own wheels do.

A linker takes the youngest version of each function that this machine's glibc has. glibc keeps the earlier ones beside
it, for programs that were linked before; a stand-in for libc.so.6 that has these alone, and comes first, has the linker
take them. With a glibc that is young enough this changes nothing.

libstdc++ has no earlier versions of what it has begun to export. Streams are templates, and the library gets its own;
what else there is comes from torch's libraries, which export it for the same reason.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

# What manylinux_2_28 stands for, which torch's wheels are.
GLIBC = (2, 28)
LIBRARIES = ("libc.so.6", "libm.so.6")
# Exported by the libtorch_cpu.so of all releases that there are libraries for.
OF_TORCH = ("_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv", "_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv")
_STREAMS = """
#define _GLIBCXX_EXTERN_TEMPLATE 0
#include <sstream>
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;
"""
# Declared by glibc 2.32 for libstdc++'s reference counts, and unknown to earlier ones. False is right for every
# program: counts are then atomic.
_SINGLE_THREADED = 'extern "C" { __attribute__((visibility("hidden"))) char __libc_single_threaded = 0; }\n'


def _version(name: str) -> tuple[int, ...]:
    return tuple(map(int, name.removeprefix("GLIBC_").split(".")))


def versions_to_take(symbols: str) -> dict[str, str]:
    """Symbol -> the version to take, the youngest that is early enough; from what ``readelf --dyn-syms`` says. A symbol
    that has none keeps its own, so that a library that uses it shows that it asks for it."""
    default, all_versions = {}, defaultdict(list)
    for name, at, version in re.findall(r" (?:FUNC|IFUNC|OBJECT) .* (\w+)(@@?)(GLIBC_[\d.]+)", symbols):
        all_versions[name].append(version)
        if at == "@@":
            default[name] = version
    taken = {}
    for name, version in default.items():
        fitting = [v for v in all_versions[name] if _version(v) <= GLIBC]
        taken[name] = max(fitting, key=_version) if fitting else version
    return taken


def stand_ins(folder: Path, cxx: str) -> list[Path]:
    """Files to link before anything else, made in ``folder`` if they are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    made = [_stand_in(folder, cxx, library) for library in LIBRARIES]
    own = folder / "own.o"
    if not own.is_file():
        _compile(cxx, "c++", _STREAMS + _SINGLE_THREADED, own, "-c", "-std=c++20", "-O3", "-fPIC")
    return [own, *made]


def _stand_in(folder: Path, cxx: str, library: str) -> Path:
    target = folder / library
    if not target.is_file():
        found = subprocess.run([cxx, f"-print-file-name={library}"], capture_output=True, text=True, check=True)
        command = ["readelf", "--dyn-syms", "--wide", found.stdout.strip()]
        versions = versions_to_take(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        nodes = defaultdict(list)
        for name, version in versions.items():
            nodes[version].append(name)
        script = folder / f"{library}.map"
        script.write_text(
            "".join(f"{version} {{ global: {'; '.join(names)}; }};\n" for version, names in nodes.items())
        )
        source = ".data\n" + "".join(f".globl {name}\n.type {name}, STT_FUNC\n{name}:\n" for name in versions)
        flags = ["-shared", "-nostdlib", f"-Wl,-soname,{library}", f"-Wl,--version-script={script}"]
        _compile(cxx, "assembler", f"{source}.byte 0\n", target, *flags)
    return target


def _compile(cxx: str, language: str, source: str, target: Path, *flags: str) -> None:
    subprocess.run([cxx, "-x", language, "-", *flags, "-o", target], input=source, text=True, check=True)
