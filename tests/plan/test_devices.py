"""How much memory a machine's devices have."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from fastdpo.plan import devices
from fastdpo.plan.devices import check_kind, group_limits, memory_of


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "limits"),
    [
        ({}, []),
        ({"proc/self/cgroup": "0::/\n"}, []),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, []),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "4096\n"}, [4096]),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/memory.max": "8192\n",
            },
            [8192],
        ),
        (
            {
                "proc/self/cgroup": "5:cpu:/x\n4:memory:/docker/1\n0::/y\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "12288\n",
            },
            [12288],
        ),
    ],
)
def test_limits_of_containers(files: dict[str, str], limits: list[int], tmp_path: Path) -> None:
    assert sorted(set(group_limits(write(tmp_path, files)))) == limits


def test_the_smaller_of_machine_and_container(monkeypatch: pytest.MonkeyPatch) -> None:
    total = psutil.virtual_memory().total
    for limits, expected in (([], total), ([1 << 62], total), ([1 << 30, 1 << 29], 1 << 29)):
        monkeypatch.setattr(devices, "group_limits", lambda limits=limits: limits)
        assert memory_of("cpu") == expected


def test_kinds_of_devices() -> None:
    for kind in ("cpu", "cuda", "xpu", "mps"):
        check_kind(kind)
    for word in ("gpu", "tpuu", ""):
        with pytest.raises(ValueError, match="no kind of device; it should be like cpu, cuda"):
            check_kind(word)
    with pytest.raises(ValueError, match="give its kind, cuda"):
        check_kind("cuda:1")
