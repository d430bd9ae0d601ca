"""How a kernel is compiled: once a machine, by numba, and kept in its cache."""

import hashlib
from collections.abc import Callable
from pathlib import Path

from numba import njit


def digest(folder: Path) -> str:
    """Of all Python files in a folder: names and contents."""
    hashed = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        hashed.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return hashed.hexdigest()[:16]


_DIGEST = digest(Path(__file__).parent)


def kernel(function: Callable, *, reassociate: bool = False) -> Callable:
    """Compile the function when it is first called; its loops may sum in any order if `reassociate`.

    Contraction to multiply-adds is the only other liberty: all of `fastmath` would lose the NaNs of a diverged network.
    """
    # numba's cache knows a function by its name and its own file, but what it calls is compiled into it: machine code
    # of an earlier version would run against the sizes of this one. So the name tells the version of all kernels.
    function.__qualname__ += f"_{_DIGEST}"
    fastmath = {"contract", "reassoc", "nsz"} if reassociate else {"contract"}
    return njit(fastmath=fastmath, nogil=True, cache=True, error_model="numpy")(function)
