"""The check of kernels before they are trusted: what it decides, what it says, and what it keeps.

The kernels are the CUDA back end's, run on the host (tests/support/cuda_host), whole or broken on purpose.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from cuda_host.build import build
from op_calls import DTYPES, assert_cuda_matches, assert_matches, call, random_case
from torch import Tensor

import fastdpo
from fastdpo.logps import device_paths, verdicts
from fastdpo.logps.check_cases import ROWS, Ops, check_cases, measure
from fastdpo.logps.device_paths import PORTABLE_OPS
from fastdpo.logps.self_check import Gate, check

CPU = torch.device("cpu")
CASE = random_case(0, 30, 16, 61, torch.bfloat16)


class Device:
    """A device of a kind that can be all that a test asks for."""

    name = "CUDA"

    def __init__(self) -> None:
        self.known = {"device": "Test GPU", "capability": "9.0", "driver": "570", "torch": "2.13", "build": "ab"}
        self.reason: str | None = None
        self.capturing = False
        self.alive = True

    def facts(self, device: torch.device) -> dict[str, str]:
        return dict(self.known)

    def misfit(self, device: torch.device) -> str | None:
        return self.reason

    def is_capturing(self, device: torch.device) -> bool:
        return self.capturing

    def works(self, device: torch.device) -> bool:
        return self.alive


class Counted:
    """Ops, and how many forwards there were; ``spoil`` may change what a forward or a backward returns, or raise."""

    def __init__(self, ops: Ops, spoil: Callable[[str, tuple[Tensor, ...]], None] = lambda op, results: None) -> None:
        self.forwards = 0
        self._ops, self._spoil = ops, spoil

    @property
    def ops(self) -> Ops:
        return Ops(self._forward, self._backward)

    def _forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        self.forwards += 1
        return self._spoiled("forward", self._ops.forward(*args, **kwargs))

    def _backward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        return self._spoiled("backward", self._ops.backward(*args, **kwargs))

    def _spoiled(self, op: str, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        self._spoil(op, results)
        return results


@pytest.fixture(scope="module")
def host(request: pytest.FixtureRequest) -> Ops:
    torch.ops.load_library(str(build(request.config.cache.mkdir("cuda_host"))))
    ops = torch.ops.fastdpo_host
    return Ops(ops.token_logps_forward, ops.token_logps_backward)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where verdicts are kept, empty; and no variable that asks for anything."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for variable in ("FASTDPO_SELF_CHECK", "FASTDPO_CUDA_LEVEL", "FASTDPO_CUDA_BLOCKS"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path / "fastdpo" / "self-check"


@pytest.fixture
def device() -> Device:
    return Device()


def one_logp_off(op: str, results: tuple[Tensor, ...]) -> None:
    if op == "forward":
        results[0][5] -= 0.01


def one_number_of_weight_off(op: str, results: tuple[Tensor, ...]) -> None:
    if op == "backward":
        results[1][3, 7] += 0.05


def one_row_not_a_number(op: str, results: tuple[Tensor, ...]) -> None:
    if op == "forward":
        results[2][6] = torch.nan


def launch_failure(op: str, results: tuple[Tensor, ...]) -> None:
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCUDA kernel errors might")


def call_gate(gate: Gate, case: Any = CASE) -> Any:
    namespace = type("Ops", (), {"token_logps_forward": gate.forward, "token_logps_backward": gate.backward})
    return call(namespace(), case)


def said(gate: Gate) -> list[str]:
    """The warnings of a call, whose results are right."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_cuda_matches(CASE, call_gate(gate))
    return [str(warning.message) for warning in caught]


# ------------------------------------------------------------------------------------------- what is measured


@pytest.mark.parametrize("dtype", DTYPES)
def test_right_kernels_pass(host: Ops, dtype: torch.dtype) -> None:
    for ops in (host, PORTABLE_OPS, device_paths.kernels("CPU")):
        outcome = check(ops, dtype, CPU)
        assert outcome.verdict is not None and outcome.verdict.passed and outcome.finding == ""
        assert {one.output for one in outcome.measured} >= {
            "logps",
            "grad hidden",
            "grad weight",
            "grad bias",
            "top_gap",
        }
        assert {one.case for one in outcome.measured} == {"plain", "all options"}


def test_cases_reach_what_they_are_for() -> None:
    """Rows that are certain, rows whose exponent is raised, rows that are ignored, kept and recomputed."""
    for case in check_cases(torch.bfloat16):
        seen = []

        def forward(*args: Any, seen: list[Any] = seen, **kwargs: Any) -> tuple[Tensor, ...]:
            results = PORTABLE_OPS.forward(*args, **kwargs)
            seen.append((args, results))
            return results

        measure(Ops(forward, PORTABLE_OPS.backward), torch.bfloat16, CPU)
        (_, _, targets, _), (logps, _, _, retained, *_) = seen[["plain", "all options"].index(case.name)]
        scored = targets != -100
        assert 0 < int((~scored).sum()) < ROWS and 0 < len(retained) < int(scored.sum())
        of_kept, of_others = logps[scored][: len(retained)], logps[scored][len(retained) :]
        for rows in (of_kept, of_others):
            # Of 776 entries one is then e^33 and more above the target.
            assert bool((rows > -1e-3).any()) and bool((rows < -40).any())


def off(results: Tensor, factor: float) -> None:
    """Multiplies the largest number."""
    numbers = results.view(-1)
    numbers[numbers.nan_to_num(neginf=0).abs().argmax()] *= factor


def exponentials_off(retained: Tensor) -> None:
    """The largest is half again as large; what is kept at a target is negative."""
    numbers = retained.view(-1)
    numbers[numbers.argmax()] *= 1.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", range(8))
def test_every_result_is_looked_at(dtype: torch.dtype, index: int) -> None:
    """The largest number of one of them is 5 % off: seen."""

    def spoil(op: str, results: tuple[Tensor, ...]) -> None:
        if op == "forward" and results[index].numel():
            if index == 3:
                exponentials_off(results[index])
            else:
                off(results[index][1:] if index == 1 else results[index], 1.05)

    outcome = check(Counted(PORTABLE_OPS, spoil).ops, dtype, CPU)
    assert outcome.verdict is not None and not outcome.verdict.passed, index


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", range(3))
def test_every_gradient_is_looked_at(dtype: torch.dtype, index: int) -> None:
    def spoil(op: str, results: tuple[Tensor, ...]) -> None:
        if op == "backward" and results[index].numel():
            off(results[index], 1.05)

    outcome = check(Counted(PORTABLE_OPS, spoil).ops, dtype, CPU)
    assert outcome.verdict is not None and not outcome.verdict.passed, index


def test_where_tensors_have_a_default_device_and_dtype() -> None:
    """The caller's, or the model's that is being made."""
    with torch.device("meta"):
        outcome = check(PORTABLE_OPS, torch.bfloat16, CPU)
    assert outcome.finding == ""
    torch.set_default_dtype(torch.float64)
    try:
        outcome = check(PORTABLE_OPS, torch.float32, CPU)
    finally:
        torch.set_default_dtype(torch.float32)
    assert outcome.finding == ""


# ------------------------------------------------------------------------------------------- what is decided


def test_right_kernels_are_checked_once_and_used(host: Ops, device: Device, folder: Path) -> None:
    native = Counted(host)
    gate = Gate(native.ops, PORTABLE_OPS, device)
    assert said(gate) == []
    in_check = 2
    assert native.forwards == in_check + 1
    assert said(gate) == [] and native.forwards == in_check + 2
    (file,) = folder.iterdir()
    kept = json.loads(file.read_text())
    assert kept["passed"] and kept["facts"]["device"] == "Test GPU" and kept["facts"]["dtype"] == "torch.bfloat16"
    assert gate.outcomes() == {"cpu bfloat16 at Level 0": "kernels, checked"}


@pytest.mark.parametrize(
    ("spoil", "output"),
    [
        (one_logp_off, r"results are wrong \(logps\); worst is logps of the case '.*', off by 1.0e-02"),
        (one_number_of_weight_off, r"results are wrong \(grad weight\); worst is grad weight of the case"),
        (one_row_not_a_number, r"results are wrong \(grad hidden\); worst is grad hidden of the case '.*', off by nan"),
        (launch_failure, "a small call failed with RuntimeError: CUDA error: no kernel image is available for"),
    ],
)
def test_kernels_that_fail_are_not_used(host: Ops, device: Device, folder: Path, spoil: Any, output: str) -> None:
    """Portable, one warning; and in the next process portable without another check."""
    native = Counted(host, spoil)
    gate = Gate(native.ops, PORTABLE_OPS, device)
    (message,) = said(gate)
    assert message.startswith("fastdpo's CUDA kernels are not to be trusted on Test GPU for bfloat16 at Level 0: ")
    assert re.search(output, message), message
    assert (
        "Please report it, with the table of `fastdpo info --check`. Such tensors go through plain PyTorch" in message
    )
    in_check = native.forwards
    assert said(gate) == [] and native.forwards == in_check
    assert gate.outcomes() == {"cpu bfloat16 at Level 0": "portable"}

    next_process = Counted(host, spoil)
    (again,) = said(Gate(next_process.ops, PORTABLE_OPS, device))
    assert again == message and next_process.forwards == 0
    assert not json.loads(next(folder.iterdir()).read_text())["passed"]


def test_a_device_that_is_lost_is_said_to_be(host: Ops, device: Device) -> None:
    """No path computes there any more; the next process knows better."""
    device.alive = False
    with pytest.raises(RuntimeError, match="kernels left Test GPU unusable for this process: a small call failed with"):
        call_gate(Gate(Counted(host, launch_failure).ops, PORTABLE_OPS, device))
    device.alive = True
    native = Counted(host)
    (message,) = said(Gate(native.ops, PORTABLE_OPS, device))
    assert "no kernel image" in message and native.forwards == 0


def test_strict_raises(host: Ops, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDPO_SELF_CHECK", "strict")
    gate = Gate(Counted(host, one_logp_off).ops, PORTABLE_OPS, device)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"are not to be trusted .* \(FASTDPO_SELF_CHECK is strict.\)"):
            call_gate(gate)
    device.known["build"] = "cd"
    assert said(Gate(host, PORTABLE_OPS, device)) == []


def test_off_skips(host: Ops, device: Device, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what was found before."""
    with pytest.warns(UserWarning, match="not to be trusted"):
        call_gate(Gate(Counted(host, one_logp_off).ops, PORTABLE_OPS, device))
    monkeypatch.setenv("FASTDPO_SELF_CHECK", "off")
    native = Counted(host)
    gate = Gate(native.ops, PORTABLE_OPS, device)
    assert said(gate) == [] and native.forwards == 1
    monkeypatch.setenv("FASTDPO_SELF_CHECK", "on")
    assert len(said(gate)) == 1 and native.forwards == 1


def test_a_mode_that_is_not_known(host: Ops, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTDPO_SELF_CHECK", "of")
    with pytest.raises(RuntimeError, match="FASTDPO_SELF_CHECK is 'of'; it should be on, off or strict"):
        call_gate(Gate(host, PORTABLE_OPS, device))


def test_a_variable_that_asks_for_what_is_not_there_is_no_failure(
    host: Ops, device: Device, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTDPO_CUDA_LEVEL", "2")
    with pytest.raises(RuntimeError, match="FASTDPO_CUDA_LEVEL is '2', but must be 0 or 1"):
        call_gate(Gate(host, PORTABLE_OPS, device))
    assert not folder.exists()


def test_each_dtype_and_level_is_checked(host: Ops, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    native = Counted(host)
    gate = Gate(native.ops, PORTABLE_OPS, device)
    for level, forwards in (("0", 3), ("1", 6), ("0", 7), ("1", 8)):
        monkeypatch.setenv("FASTDPO_CUDA_LEVEL", level)
        assert said(gate) == [] and native.forwards == forwards
    case = random_case(0, 30, 16, 61, torch.float32)
    assert_cuda_matches(case, call_gate(gate, case))
    assert native.forwards == 11
    assert set(gate.outcomes()) == {
        f"cpu {words}" for words in ("bfloat16 at Level 0", "bfloat16 at Level 1", "float32 at Level 1")
    }


def test_what_is_known_of_a_device_needs_no_check(host: Ops, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    device.reason = "its compute capability is 7.5, and they were compiled for 8.0"
    native = Counted(host)
    gate = Gate(native.ops, PORTABLE_OPS, device)
    (message,) = said(gate)
    assert message.startswith(
        "Test GPU cannot run fastdpo's CUDA kernels: its compute capability is 7.5, and they were"
    )
    assert said(gate) == [] and native.forwards == 0
    monkeypatch.setenv("FASTDPO_SELF_CHECK", "strict")
    with pytest.raises(RuntimeError, match="cannot run fastdpo's CUDA kernels"):
        call_gate(Gate(native.ops, PORTABLE_OPS, device))


def test_while_a_graph_is_captured(host: Ops, device: Device, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Used unchecked, with a warning; checked once the capture is over. What is on disk counts in a capture, too."""
    device.capturing = True
    native = Counted(host)
    gate = Gate(native.ops, PORTABLE_OPS, device)
    (message,) = said(gate)
    assert "have not been checked on Test GPU for bfloat16 at Level 0, and cannot be while a CUDA graph" in message
    assert said(gate) == [] and native.forwards == 2 and not folder.exists()
    monkeypatch.setenv("FASTDPO_SELF_CHECK", "strict")
    with pytest.raises(RuntimeError, match="make one call before that"):
        call_gate(gate)
    monkeypatch.delenv("FASTDPO_SELF_CHECK")
    device.capturing = False
    assert said(gate) == [] and native.forwards == 5
    device.capturing = True
    native = Counted(host)
    assert said(Gate(native.ops, PORTABLE_OPS, device)) == [] and native.forwards == 1


def test_memory_that_does_not_suffice_is_no_verdict(host: Ops, device: Device, folder: Path) -> None:
    """The call goes on with the kernels, and says itself what it lacks; the next one is checked again."""
    room = []

    def full(op: str, results: tuple[Tensor, ...]) -> None:
        in_check = op == "forward" and len(results[0]) == ROWS
        if in_check and len(room) < 2:  # before the forward, and before the backward
            room.append(op)
            raise RuntimeError("fastdpo: out of memory: could not allocate [3, 4] of Float")

    native = Counted(host, full)
    gate = Gate(native.ops, PORTABLE_OPS, device)
    assert said(gate) == [] and gate.outcomes() == {} and not folder.exists()
    assert said(gate) == [] and len(gate.outcomes()) == 1


def test_threads_check_once(device: Device) -> None:
    """(The CUDA back end on the host is one thread's.)"""
    native = Counted(PORTABLE_OPS, lambda op, results: time.sleep(0.01))
    gate = Gate(native.ops, PORTABLE_OPS, device)
    threads = [threading.Thread(target=call_gate, args=(gate,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    in_check = 2
    assert native.forwards == in_check + 4


# ------------------------------------------------------------------------------------------- what is kept


@pytest.mark.parametrize("fact", ["device", "capability", "driver", "torch", "build"])
def test_another_device_driver_torch_or_build_is_checked_again(
    host: Ops, device: Device, folder: Path, fact: str
) -> None:
    with pytest.warns(UserWarning, match="not to be trusted"):
        call_gate(Gate(Counted(host, one_logp_off).ops, PORTABLE_OPS, device))
    device.known[fact] += " and something else"
    native = Counted(host)
    assert said(Gate(native.ops, PORTABLE_OPS, device)) == [] and native.forwards == 3
    assert len(list(folder.iterdir())) == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"null", b'{"passed": "yes", "finding": "", "date": ""}', b'{"passed": true}'],
)
def test_a_file_that_cannot_be_read_is_none(host: Ops, device: Device, folder: Path, content: bytes) -> None:
    call_gate(Gate(host, PORTABLE_OPS, device))
    (file,) = folder.iterdir()
    for spoiled in (content, file.read_bytes().replace(b"Test GPU", b"Other GPU")):
        file.write_bytes(spoiled)
        native = Counted(host)
        assert said(Gate(native.ops, PORTABLE_OPS, device)) == [] and native.forwards == 3
    assert verdicts.load(json.loads(file.read_text())["facts"]).passed


def test_a_folder_that_cannot_be_written(
    host: Ops, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file stands in its place; in a folder of /proc nobody, root included, makes another."""
    (tmp_path / "file").write_text("")
    for home in (tmp_path / "file", Path("/proc/self")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(home))
        native = Counted(host)
        assert said(Gate(native.ops, PORTABLE_OPS, device)) == [] and native.forwards == 3


def test_looking_again_replaces_what_was_found(host: Ops, device: Device, folder: Path) -> None:
    """As `fastdpo info --check` does."""
    with pytest.warns(UserWarning, match="not to be trusted"):
        call_gate(Gate(Counted(host, one_logp_off).ops, PORTABLE_OPS, device))
    assert Gate(host, PORTABLE_OPS, device).check(CPU, torch.bfloat16).finding == ""
    native = Counted(host)
    assert said(Gate(native.ops, PORTABLE_OPS, device)) == [] and native.forwards == 1


IN_A_PROCESS = """
import sys
import torch
from fastdpo.logps import self_check
from fastdpo.logps.check_cases import Ops
from fastdpo.logps.device_paths import PORTABLE_OPS
sys.path.insert(0, sys.argv[1])
from test_self_check import CASE, Counted, Device, call_gate
native = Counted(PORTABLE_OPS)
gate = self_check.Gate(native.ops, PORTABLE_OPS, Device())
sys.stdin.readline()  # both start at the same time
for _ in range(20):
    gate._trusted.clear()
    call_gate(gate)
print(native.forwards)
"""


def test_two_processes_at_a_time(folder: Path) -> None:
    """Each checks or reads a whole file; one file is left."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent / "support"), os.environ.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", IN_A_PROCESS, str(here)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        for _ in range(2)
    ]
    answers = [process.communicate("go\n") for process in processes]
    assert all(process.returncode == 0 for process in processes), answers
    assert all(20 <= int(out) <= 22 for out, _ in answers)
    (file,) = folder.iterdir()
    assert json.loads(file.read_text())["passed"]


# ------------------------------------------------------------------------------------------- in the dispatcher


@pytest.fixture
def registered(host: Ops, device: Device) -> Iterator[Callable[[Counted], Gate]]:
    """Puts a gate before the CPU's ops, as one stands before CUDA's."""
    libraries = []

    def put(native: Counted) -> Gate:
        gate = Gate(native.ops, PORTABLE_OPS, device)
        libraries.append(torch.library.Library("fastdpo", "IMPL"))
        device_paths.register(libraries[-1], Ops(gate.forward, gate.backward), "CPU")
        return gate

    yield put
    libraries.clear()


def loss_and_gradients(compiled: bool = False) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 6, 16, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(50, 16, generator=generator).bfloat16().requires_grad_()
    targets = torch.randint(0, 50, (4, 6), generator=generator)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return fastdpo.dpo_loss(hidden, weight, targets, ref_hidden=hidden.detach().flip(0)).loss

    function = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
    value = function(hidden, weight)
    return value.detach(), *torch.autograd.grad(value, [hidden, weight])


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("spoil", [None, one_logp_off, launch_failure])
def test_a_loss_through_the_gate(registered: Callable[[Counted], Gate], host: Ops, spoil: Any, compiled: bool) -> None:
    """Within autograd and in a compiled graph, where the check comes at the first run: right in any case."""
    expected = loss_and_gradients()
    native = Counted(host, spoil) if spoil else Counted(host)
    gate = registered(native)
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = loss_and_gradients(compiled)
    messages = [str(one.message) for one in caught if "fastdpo" in str(one.message)]
    assert len(messages) == (spoil is not None)
    assert list(gate.outcomes().values()) == ["portable" if spoil else "kernels, checked"]
    for value, right in zip(found, expected, strict=True):
        assert (value - right).norm() <= 2**-6 * right.norm()


def test_under_autocast_and_in_inference_mode(registered: Callable[[Counted], Gate], host: Ops) -> None:
    for context in (torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.no_grad()):
        gate = registered(Counted(host))
        with context:
            results = call(torch.ops.fastdpo, CASE, needs=())
        assert_matches(CASE, results)
        assert list(gate.outcomes().values()) == ["kernels, checked"]
        for file in verdicts.folder().iterdir():
            file.unlink()


def test_fake_tensors_are_not_checked(registered: Callable[[Counted], Gate], host: Ops, folder: Path) -> None:
    native = Counted(host)
    registered(native)
    with torch._subclasses.FakeTensorMode():
        result = fastdpo.token_logps(
            torch.randn(3, 4), torch.randn(5, 4), torch.zeros(3, dtype=torch.int64), num_scored=3
        )
    assert result.logps.shape == (3,) and native.forwards == 0 and not folder.exists()


def test_cpu_tensors_are_not_checked(folder: Path) -> None:
    """Where there is nothing but a CPU, no file, no folder, no code of the check."""
    code = """
import torch
from fastdpo import token_logps
from fastdpo.logps import self_check
self_check.check = self_check.measure = None
token_logps(torch.randn(3, 4, requires_grad=True), torch.randn(5, 4), torch.tensor([0, 1, 2])).logps.sum().backward()
"""
    done = processes.run(code)
    assert done.returncode == 0, done.stderr
    assert not folder.parent.exists()


def test_a_check_takes_a_moment() -> None:
    """0.2 GFLOP for its products, on the device and in float64 on the host, and no tensor of more than 2 MB."""
    cases = check_cases(torch.bfloat16)
    assert sum(2 * 3 * case.hidden.numel() * len(case.weight) for case in cases) <= 0.2e9
    assert max(case.hidden.shape[0] * len(case.weight) * 8 for case in cases) <= 2 << 20
