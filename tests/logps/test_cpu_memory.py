"""The memory of CPU tensors that `fastdpo train` takes: used again, aligned, and in every other respect as torch's."""

from __future__ import annotations

import textwrap

import processes
import pytest

from fastdpo.logps import cpu_memory
from fastdpo.logps.native import FACTS

here = pytest.mark.skipif(
    FACTS["cpu_library"] is None or not cpu_memory._malloc_is_glibcs(), reason="for the CPU library over glibc's malloc"
)


def printed(code: str, **env: str) -> list[str]:
    result = processes.run(textwrap.dedent(code), **env)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@here
def test_what_was_freed_is_used_again() -> None:
    """Batches of tensors of the same sizes, between them small ones that stay: one batch's memory and theirs."""
    code = """
        import sys, torch
        from fastdpo.logps.cpu_memory import use_tensor_memory
        assert use_tensor_memory()

        def resident():
            lines = open("/proc/self/status").read().splitlines()
            return int(next(line for line in lines if line.startswith("VmRSS")).split()[1])

        torch.ones(1 << 22)  # which raises the size from which malloc hands blocks back
        stays, before = [], resident()
        for _ in range(6):
            batch = []
            for size in [70_000, 90_000] * 50:
                batch.append(torch.ones(size))
                stays.append(torch.ones(2_000))
            held = resident() - before
            del batch
        print(held * 1024 / 4 / (50 * 160_000 + len(stays) * 2_000))
    """
    (share,) = printed(code)
    assert float(share) < 1.1  # torch's own allocator comes to 3.1


@here
def test_tensors_of_all_sizes_come_and_go() -> None:
    """Each keeps its numbers while others come and go, and together they take little more than at most is there."""
    code = """
        import random, torch
        from fastdpo.logps.cpu_memory import use_tensor_memory
        assert use_tensor_memory()

        def status(field):
            lines = open("/proc/self/status").read().splitlines()
            return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024

        choose, there, now, most = random.Random(0), [], 0, 0
        for _ in range(8):
            torch.full((8,), 1).sum()  # what torch sets up for itself
        open("/proc/self/clear_refs", "w").write("5")
        before = status("VmRSS")
        for number in range(2_000):
            room = 150e6 if number // 500 % 2 else 60e6
            while there and now > room * choose.random():
                kept, told = there.pop(choose.randrange(len(there)))
                assert kept.min() == kept.max() == told
                now -= kept.nbytes
            there.append((torch.full((int(2 ** choose.uniform(0, 22)),), number % 7, dtype=torch.int32), number % 7))
            now += there[-1][0].nbytes
            most = max(most, now)
        print((status("VmHWM") - before) / most)
    """
    (share,) = printed(code)
    assert float(share) < 1.25  # a sixteenth more may be kept, in blocks an eighth larger than their tensors


@here
def test_a_forked_process_goes_on() -> None:
    code = """
        import os, threading, torch
        from fastdpo.logps.cpu_memory import use_tensor_memory
        assert use_tensor_memory()
        going = True

        def work():
            while going:
                torch.ones(100_000)

        threads = [threading.Thread(target=work) for _ in range(3)]
        [thread.start() for thread in threads]
        for _ in range(20):
            child = os.fork()
            if child == 0:
                os._exit(int(torch.ones(100_000).sum()) != 100_000)
            assert os.waitpid(child, 0)[1] == 0
        going = False
        [thread.join() for thread in threads]
        print("all")
    """
    assert printed(code) == ["all"]


@here
@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_settings_of_ones_own_win(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    assert not cpu_memory.use_tensor_memory()


@here
def test_in_every_other_respect_it_is_torchs() -> None:
    code = """
        import io, threading, torch
        from fastdpo.logps.cpu_memory import use_tensor_memory
        from fastdpo.logps.out_of_memory import is_out_of_memory
        before = torch.arange(10)
        assert use_tensor_memory() and use_tensor_memory()
        sizes = (0, 1, 3, 63, 64, 65, 4096, 1 << 20, 40 << 20)
        assert all(torch.empty(size, dtype=torch.uint8).data_ptr() % 64 == 0 for size in sizes)
        before.resize_(100_000)[10:] = 7  # of the allocator that it came from
        assert before[:10].tolist() == list(range(10)) and before[-1] == 7
        grown = torch.full((3,), 2.0).resize_(50_000)
        assert grown[:3].tolist() == [2.0] * 3 and grown.numpy().shape == (50_000,)
        shared = torch.ones(1000).share_memory_()
        assert shared.sum() == 1000
        file = io.BytesIO()
        torch.save(shared, file)
        file.seek(0)
        assert torch.equal(torch.load(file), shared)
        gone = [torch.ones(100_000) for _ in range(8)]
        thread = threading.Thread(target=gone.clear)
        thread.start()
        thread.join()
        x = torch.randn(64, 64, requires_grad=True)
        (x @ x).tanh().sum().backward()
        assert torch.isfinite(x.grad).all()
        for size in (1 << 50, 2**63 - 1):
            try:
                torch.empty(size, dtype=torch.uint8)
            except RuntimeError as error:
                assert is_out_of_memory(error) and str(size) in str(error), error
            else:
                raise AssertionError(size)
        with torch.profiler.profile(profile_memory=True) as profile:
            torch.empty(1000)
        assert {event.key: event.self_cpu_memory_usage for event in profile.key_averages()}["aten::empty"] == 4000
        print("all")
    """
    assert printed(code)[-1] == "all"


def test_another_malloc_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_memory, "_malloc_is_glibcs", lambda: False)
    assert not cpu_memory.use_tensor_memory()


@pytest.mark.parametrize("library", [None, object()])
def test_without_the_library_nothing_happens(library: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_memory, "cpu_library", lambda: library)
    assert not cpu_memory.use_tensor_memory()


@here
def test_glibcs_malloc_is_told_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_memory.platform, "libc_ver", lambda: ("", ""))
    assert not cpu_memory._malloc_is_glibcs()
