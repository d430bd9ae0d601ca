import os
from types import SimpleNamespace

import psutil
import pytest

from nas_mnist.workers import machine

GIB = 2**30


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Control groups of a machine with 64 GiB free; `write(membership, {file: text})` makes them."""
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GIB))
    monkeypatch.setattr(psutil.Process, "memory_info", lambda self: SimpleNamespace(rss=GIB))

    def write(membership, files):
        (tmp_path / "cgroup").write_text(membership)
        for name, text in files.items():
            path = tmp_path / "groups" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


def test_without_control_groups_there_is_what_is_free(groups):
    assert machine.free_bytes() == 64 * GIB


@pytest.mark.parametrize(
    ("membership", "files"),
    [
        ("0::/\n", {"memory.max": f"{4 * GIB}\n"}),  # a container of version 2, which sees its own group as the root
        ("0::/a/b\n", {"a/memory.max": f"{4 * GIB}\n", "a/b/memory.max": "max\n"}),  # the limit of a group around it
        ("5:cpu:/x\n4:memory:/docker/1\n", {"memory/memory.limit_in_bytes": f"{4 * GIB}\n"}),  # version 1
    ],
)
def test_control_group_limits_the_memory(groups, membership, files):
    groups(membership, files)
    assert machine.free_bytes() == 3 * GIB  # the parent's own is not for workers
    assert machine.n_workers_in_memory(on_gpu=False) == 7 and machine.n_workers_in_memory(on_gpu=True) == 3


def test_group_without_a_limit_changes_nothing(groups):
    groups("0::/\n", {"memory.max": "max\n"})
    assert machine.free_bytes() == 64 * GIB


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    assert machine.n_cores() <= len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else True
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert machine.n_cores() == 1
