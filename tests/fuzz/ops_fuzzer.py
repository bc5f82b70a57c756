"""Builds libFuzzer's program of the CPU ops with clang's sanitizers, and runs it on every instruction set there is.

    python tests/fuzz/ops_fuzzer.py --seconds 3600

Inputs that found something new are kept in the corpus; one that ends in a failure is written beside it, and is run
again by ``--again FILE``.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import fuzz_loop
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from building.libraries import flags_of  # noqa: E402
from building.ninja import NinjaFile  # noqa: E402

HERE = Path(__file__).resolve().parent / "ops"
CLANGS = ("clang++", *(f"clang++-{version}" for version in range(22, 13, -1)))
# Errors end the program. A class's type is torch's to tell, and torch is not built with the sanitizer.
SANITIZERS = (
    "-fsanitize=address,undefined,float-cast-overflow -fno-sanitize=vptr,function -fno-sanitize-recover=all "
    "-fno-omit-frame-pointer -g1"
)
PATHS = ("avx512_bf16", "avx512", "avx2", "plain")
# What torch and its libraries keep until the end.
LEAKS = "leak:libtorch\nleak:libc10\nleak:libgomp\nleak:libmkl\nleak:dnnl\nleak:libopenblas\n"


def find_clang() -> str:
    """A clang that has libFuzzer and the sanitizers."""
    for name in filter(shutil.which, (os.environ.get("CLANG", ""), *CLANGS)):
        runtime = subprocess.run([name, "-print-runtime-dir"], capture_output=True, text=True).stdout.strip()
        # Older layouts have one folder for all targets, and the target in the file's name.
        folders = [Path(runtime), Path(runtime).parent / "linux"]
        if any(list(folder.glob("libclang_rt.fuzzer*")) for folder in folders if folder.is_dir()):
            return name
    sys.exit(
        "There is no clang++ with libFuzzer and the sanitizers on PATH. Debian and Ubuntu have them in two packages: "
        "apt-get install clang-16 libclang-rt-16-dev. CLANG=... names another one."
    )


def build(folder: Path) -> Path:
    """The program; ninja makes what is older than its source."""
    from torch.utils.cpp_extension import include_paths

    clang = find_clang()
    folder.mkdir(parents=True, exist_ok=True)
    libraries = Path(torch.__file__).parent / "lib"
    common = (
        f"-std=c++20 -fPIC -Wall -Wextra -Wno-unused-parameter -Wno-unknown-warning-option "
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)} "
        + " ".join(f"-isystem {path}" for path in include_paths())
    )
    file = NinjaFile()
    file.rule("cxx", [clang, "-MMD -MF $out.d $flags -c $in -o $out"], depfile=True)
    file.rule("link", [clang, "$in -o $out $flags"])
    tested = [s for s in sorted((ROOT / "csrc/cpu").glob("*.cpp")) if s.name != "binding.cpp"]
    objects = []
    for source in [*tested, *sorted(HERE.glob("*.cpp"))]:
        flags = [common, *flags_of(source)]
        if source.name == "truth.cpp":  # extended precision takes most of the time, and reads no memory of the ops
            flags.append("-O2")
        else:
            flags += ["-O1", SANITIZERS, "-fsanitize=fuzzer-no-link" if source in tested else ""]
        objects.append(file.edge("cxx", folder / f"{source.stem}.o", [source], flags=" ".join(flags)))
    link = f"-L{libraries} -ltorch -ltorch_cpu -lc10 -Wl,-rpath,{libraries} {SANITIZERS} -fsanitize=fuzzer"
    program = file.edge("link", folder / "ops_fuzzer", objects, flags=link)
    file.run(folder)
    return program


def environment(folder: Path, path: str) -> dict[str, str]:
    leaks = folder / "leaks.txt"
    leaks.write_text(LEAKS)
    return os.environ | {
        "FASTDPO_CPU_PATH": path,
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",  # threads that spin would wait for cores that others have
        "ASAN_OPTIONS": "detect_leaks=1:allocator_may_return_null=1:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "LSAN_OPTIONS": f"suppressions={leaks}:print_suppressions=0",
    }


def paths_here() -> list[str]:
    known = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    flags = set(re.findall(r"\w+", known))
    needs = {"avx512_bf16": "avx512_bf16", "avx512": "avx512vl", "avx2": "avx2", "plain": ""}
    return [path for path in PATHS if not needs[path] or needs[path] in flags]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    fuzz_loop.add_flags(parser, of="instruction sets", folder=ROOT / "build/fuzz")
    parser.add_argument("--paths", nargs="+", choices=PATHS, default=None, help="the instruction sets; by default all")
    parser.add_argument("--build", action="store_true", help="build, and no more")
    args = parser.parse_args()
    program = build(args.folder / "ops")
    if args.build:
        return
    paths = args.paths or paths_here()
    corpus = args.folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    if not any(corpus.iterdir()):  # libFuzzer's own inputs grow slowly, and one that ends early is filled with zeros
        for i in range(64):
            (corpus / f"first-{i}").write_bytes(random.Random(i).randbytes(400))
    failed = []
    for path in paths:
        command = [str(program), "-rss_limit_mb=6000", "-timeout=60", "-max_len=600"]
        command.append(f"-artifact_prefix={args.folder}/{path}-")
        env = environment(args.folder, path)
        if not fuzz_loop.fuzz(path, command, corpus, args.seconds // len(paths), args, env):
            failed.append(path)
    fuzz_loop.end(failed)


if __name__ == "__main__":
    main()
