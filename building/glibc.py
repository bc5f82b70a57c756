"""Links a library so that it asks for no younger glibc than torch's own wheels do.

A linker takes the youngest version of each function that this machine's glibc has. glibc keeps the earlier ones beside
it, for programs that were linked before; a stand-in for libc.so.6 that has these alone, and comes first, has the linker
take them. With a glibc that is young enough this changes nothing.
"""

from __future__ import annotations

import re
import subprocess
from collections import defaultdict
from pathlib import Path

# What manylinux_2_28 stands for, which torch's wheels are.
GLIBC = (2, 28)
LIBRARIES = ("libc.so.6", "libm.so.6")
# Declared by glibc 2.32 for libstdc++'s reference counts, and unknown to earlier ones. False is right for every
# program: counts are then atomic.
_SINGLE_THREADED = 'extern "C" { __attribute__((visibility("hidden"))) char __libc_single_threaded = 0; }\n'


def _version(name: str) -> tuple[int, ...]:
    return tuple(map(int, name.removeprefix("GLIBC_").split(".")))


def earlier_versions(symbols: str) -> dict[str, str]:
    """Function -> the version to take in the place of a younger default; from what ``readelf --dyn-syms`` says."""
    default, others = {}, defaultdict(list)
    for name, at, version in re.findall(r" (?:FUNC|IFUNC) .* (\w+)(@@?)(GLIBC_[\d.]+)", symbols):
        if at == "@@":
            default[name] = version
        else:
            others[name].append(version)
    found = {}
    for name, version in default.items():
        fitting = [v for v in others[name] if _version(v) <= GLIBC]
        if _version(version) > GLIBC and fitting:
            found[name] = max(fitting, key=_version)
    return found


def stand_ins(folder: Path, cxx: str) -> list[Path]:
    """Files to link before anything else, made in ``folder`` if they are not there."""
    folder.mkdir(parents=True, exist_ok=True)
    made = [_stand_in(folder, cxx, library) for library in LIBRARIES]
    own = folder / "single_threaded.o"
    if not own.is_file():
        _compile(cxx, _SINGLE_THREADED, own, "-c", "-fPIC")
    return [own, *filter(None, made)]


def _stand_in(folder: Path, cxx: str, library: str) -> Path | None:
    target = folder / library
    if not target.is_file():
        found = subprocess.run([cxx, f"-print-file-name={library}"], capture_output=True, text=True, check=True)
        command = ["readelf", "--dyn-syms", "--wide", found.stdout.strip()]
        versions = earlier_versions(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        if not versions:
            return None
        script = folder / f"{library}.map"
        nodes = defaultdict(list)
        for name, version in sorted(versions.items()):
            nodes[version].append(name)
        script.write_text(
            "".join(f"{version} {{ global: {'; '.join(names)}; }};\n" for version, names in nodes.items())
        )
        source = 'extern "C" {\n' + "".join(f"void {name}() {{}}\n" for name in versions) + "}\n"
        _compile(
            cxx,
            source,
            target,
            *("-shared", "-fPIC", "-nostdlib", "-fno-builtin", "-w"),
            *(f"-Wl,-soname,{library}", f"-Wl,--version-script={script}"),
        )
    return target


def _compile(cxx: str, source: str, target: Path, *flags: str) -> None:
    subprocess.run([cxx, "-x", "c++", "-", *flags, "-o", target], input=source, text=True, check=True)
