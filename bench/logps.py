"""token_logps against full logits on the CPU: time, peak memory and error against float64, forward and backward.

    python bench/logps.py [--rounds 5] [--json FILE]

Every measurement runs in a process of its own, the ways in turn; times are medians over the rounds, memory is the
peak beyond inputs and gradients. "fastdpo, least memory" keeps nothing for the backward (retain_bytes=0); "full
logits" is what a training loop has without fastdpo: F.linear in the inputs' dtype, then log_softmax in float32.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import fastdpo

WAYS = ("fastdpo", "fastdpo, least memory", "full logits")
# name -> (N tokens, H, V, dtype)
CASES = {
    "N=1,024 H=512 V=32,000 float32": (1024, 512, 32_000, "float32"),
    "N=1,024 H=512 V=32,000 bfloat16": (1024, 512, 32_000, "bfloat16"),
    "N=1,024 H=896 V=151,936 bfloat16": (1024, 896, 151_936, "bfloat16"),
}


def resident(field: str) -> int:
    """Bytes: VmRSS is what the process holds now, VmHWM the most it held since the mark was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def make_inputs(n: int, h: int, v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, h, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(v, h, generator=generator) / h**0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, v, (n,), generator=generator)


def logps_of(way: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    if way == "fastdpo":
        return fastdpo.token_logps(hidden, weight, targets).logps
    if way == "fastdpo, least memory":
        return fastdpo.token_logps(hidden, weight, targets, retain_bytes=0).logps
    logits = F.linear(hidden, weight).float()
    return logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def error_against_float64(logps: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int = 128) -> float:
    """The largest |error| / (1 + |logp|) over the first rows."""
    hidden, targets = hidden[:rows].detach().double(), targets[:rows]
    exact = F.linear(hidden, weight.detach().double()).log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return float(((logps[:rows].detach().double() - exact).abs() / (1 + exact.abs())).max())


def measure(way: str, n: int, h: int, v: int, dtype: str) -> dict[str, float]:
    """One forward and backward, after a small one that loads what is loaded once."""
    small = make_inputs(64, h, 64, getattr(torch, dtype))
    logps_of(way, *small).sum().backward()
    hidden, weight, targets = make_inputs(n, h, v, getattr(torch, dtype))
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before, start = resident("VmRSS"), time.perf_counter()
    logps = logps_of(way, hidden, weight, targets)
    logps.sum().backward()
    seconds = time.perf_counter() - start
    gradients = sum(x.grad.numel() * x.grad.element_size() for x in (hidden, weight))
    peak = resident("VmHWM") - before - gradients
    return {"seconds": seconds, "peak_mb": peak / 1e6, "error": error_against_float64(logps, hidden, weight, targets)}


def measure_in_process(way: str, case: tuple[int, int, int, str]) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", way, *map(str, case)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each way (default: 5)")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--one", nargs=5, metavar=("WAY", "N", "H", "V", "DTYPE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        way, n, h, v, dtype = args.one
        print(json.dumps(measure(way, int(n), int(h), int(v), dtype)))
        return

    machine = {"cpu": cpu_name(), "threads": torch.get_num_threads(), **fastdpo.build_info()}
    print(f"{machine['cpu']}, {machine['threads']} threads, {machine['cpu_path']}, torch {torch.__version__}\n")
    print(f"{'case':<34}{'':<22}{'seconds':>9}{'peak MB':>9}{'error':>10}")
    results = {}
    for name, case in CASES.items():
        rounds = [{way: measure_in_process(way, case) for way in WAYS} for _ in range(args.rounds)]
        results[name] = rounds
        for way in WAYS:
            medians = {
                key: statistics.median(one[way][key] for one in rounds) for key in ("seconds", "peak_mb", "error")
            }
            line = f"{medians['seconds']:>9.2f}{medians['peak_mb']:>9.0f}{medians['error']:>10.1e}"
            print(f"{name:<34}{way:<22}{line}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
