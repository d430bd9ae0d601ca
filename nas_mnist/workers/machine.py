"""What this machine has for workers, or what a container is given of it: processors and memory."""

import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
from loky import cpu_count

SHARED_BYTES = 400_000_000  # of all workers together: PyTorch, the images
FORKED_BYTES = 400_000_000  # of each: the maps of a batch; at the first start, the compiler
WHOLE_BYTES = 900_000_000  # of one that has a GPU's context, or shares nothing
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
MEMBERSHIP, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")


def n_cores() -> int:
    """Those that this process may use: fewer than there are by affinity or a control group."""
    return cpu_count()


def worker_bytes(*, on_gpu: bool) -> int:
    """What a worker takes of its own. On macOS it is not forked, and shares nothing."""
    return WHOLE_BYTES if on_gpu or sys.platform == "darwin" else FORKED_BYTES


def n_workers_in_memory(*, on_gpu: bool) -> int:
    """How many workers there is memory for, one at least."""
    return max(1, (free_bytes() - SHARED_BYTES) // worker_bytes(on_gpu=on_gpu))


def free_bytes() -> int:
    """What processes that are started now can get: free memory, or what control groups leave beside this process."""
    own = psutil.Process().memory_info().rss
    return min([psutil.virtual_memory().available, *(limit - own for limit in _group_limits())])


def memory_limit() -> int | None:
    """Bytes that a container is given; none if it has all of the machine's."""
    limit = min(_group_limits(), default=None)
    return limit if limit is not None and limit < psutil.virtual_memory().total else None


def processor() -> str:
    """As its maker calls it."""
    if (path := Path("/proc/cpuinfo")).exists():
        names = (
            line.split(":", 1)[1].strip() for line in path.read_text().splitlines() if line.startswith("model name")
        )
        return next(names, platform.machine())
    return platform.machine()


def cache_sizes(folder: Path = CACHES) -> dict[str, str]:
    """Those of a core for data, nearest first, as Linux writes them: {"L1": "32K", "L2": "1024K"}."""
    found = {}
    for path in sorted(folder.glob("index*")):
        level, kind, size = ((path / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found[f"L{level}"] = size
    return found


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
