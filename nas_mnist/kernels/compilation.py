"""How kernels are compiled: once a machine, by numba, which caches the entry point and all that it calls."""

import hashlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from filelock import FileLock
from numba import njit


def digest(folder: Path) -> str:
    """Of all Python files in a folder: names and contents."""
    hashed = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        hashed.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return hashed.hexdigest()[:16]


_DIGEST = digest(Path(__file__).parent)


def kernel(function: Callable | None = None, *, reassociate: bool = False, cache: bool = False) -> Callable:
    """Compile the function where it is called; its loops may sum in any order if `reassociate`.

    Contraction to multiply-adds is the only other liberty: all of `fastmath` would lose the NaNs of a diverged network.
    """
    if function is None:
        return partial(kernel, reassociate=reassociate, cache=cache)
    fastmath = {"contract", "reassoc", "nsz"} if reassociate else {"contract"}
    return njit(fastmath=fastmath, nogil=True, cache=cache, error_model="numpy")(function)


def entry_point(function: Callable) -> Callable:
    """A kernel that Python calls, kept in numba's cache.

    numba knows a function by its name and its own file, but what it calls is compiled into it: machine code of an
    earlier version would run against the sizes of this one. So the name tells the version of all kernels.
    """
    function.__qualname__ += f"_{_DIGEST}"
    return kernel(function, cache=True)


def cache_folder(entry: Callable) -> Path:
    """Where numba keeps what it compiles for this entry point."""
    return Path(entry.stats.cache_path)


def is_compiled(entry: Callable) -> bool:
    """Whether there is machine code of this version of the kernels in the cache."""
    return any(cache_folder(entry).glob(f"*{_DIGEST}*.nbc"))


@contextmanager
def compiling(entry: Callable) -> Iterator[None]:
    """Around an entry point's first call: one process compiles, and says so on a terminal; others wait, then load."""
    folder = cache_folder(entry)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{_DIGEST}.lock"):
        if not is_compiled(entry) and sys.stderr.isatty():
            print("compiling the training step for this processor, once: up to a minute …", file=sys.stderr, flush=True)
        yield
