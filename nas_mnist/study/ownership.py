"""Which process a running trial belongs to, and whether that process is still there."""

import contextlib
import os
import socket
from functools import cache
from pathlib import Path
from typing import Any

import psutil
from optuna.trial import FrozenTrial

OWNER = "worker"  # user attribute of a trial: host, process and its start


def owner() -> list[Any]:
    """This process, as it is written into the trials it runs."""
    return [host(), os.getpid(), _started(os.getpid())]


@cache
def host() -> str:
    """What process numbers are valid for. Names are not unique: cloned machines, containers on their host's network."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # Linux alone
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(parts)


def is_orphan(trial: FrozenTrial) -> bool:
    """Whether the process of this host that a running trial belongs to is gone; the caller holds the storage's lock."""
    if OWNER not in trial.user_attrs:
        return True  # `ask` writes the owner under the lock that we hold: it died in between
    _, pid, started = trial.user_attrs[OWNER]
    return is_of_this_host(trial) and _started(pid) != started


def is_of_this_host(trial: FrozenTrial) -> bool:
    return trial.user_attrs.get(OWNER, [None])[0] == host()


def _started(pid: int) -> float | None:
    """When a process started, to tell it from a later one of the same number; None if there is no such process."""
    try:
        if psutil.LINUX:  # ticks since boot: unlike psutil's time of day they stay the same when the clock is set
            state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return None if state in "ZX" else float(fields[18])  # killed, and its parent has not asked after it yet
        return psutil.Process(pid).create_time()
    except (psutil.NoSuchProcess, OSError):
        return None
