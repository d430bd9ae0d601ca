"""What this machine has for workers, or what a container is given of it: processors and memory."""

from collections.abc import Iterator
from pathlib import Path

import psutil
from loky import cpu_count

WORKER_BYTES = 900_000_000  # PyTorch, the images and the maps of a batch
MEMBERSHIP, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def n_cores() -> int:
    """Those that this process may use: fewer than there are by affinity or a control group."""
    return cpu_count()


def n_workers_in_memory() -> int:
    """How many workers there is memory for, one at least."""
    return max(1, free_bytes() // WORKER_BYTES)


def free_bytes() -> int:
    """What processes that are started now can get: free memory, or what control groups leave beside this process."""
    own = psutil.Process().memory_info().rss
    return min([psutil.virtual_memory().available, *(limit - own for limit in _group_limits())])


def _group_limits() -> Iterator[int]:
    """The limits, in bytes, of the control groups around this process, of version 2 and 1."""
    lines = MEMBERSHIP.read_text().splitlines() if MEMBERSHIP.exists() else []
    for _, controllers, group in (line.split(":", 2) for line in lines):
        if controllers == "":
            root, name = GROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, name = GROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        path = root / group.lstrip("/")
        for folder in (path, *path.parents):  # a container may see its own group as the root
            if folder.is_relative_to(root) and (folder / name).exists():
                text = (folder / name).read_text().strip()
                if text.isdigit():  # else "max"
                    yield int(text)
