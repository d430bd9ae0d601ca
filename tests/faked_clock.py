"""A clock that is set while a command runs: by libfaketime, which reads it from a file."""

from pathlib import Path

LIBFAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
IS_INSTALLED = LIBFAKETIME is not None

# Where the monotonic clock is left alone, libfaketime answers a sleep until some time of it, and Python sleeps so, with
# "invalid argument". A wait for nothing that ends after as many seconds comes through.
SLEEP = """\
import select
import time

time.sleep = lambda seconds: select.select([], [], [], seconds)
"""


def environment(clock: Path) -> dict[str, str]:
    """For a command whose clock is off by what the file `clock` says when it is looked at: +0, -2d, …"""
    folder = clock.with_name("faked_clock")
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(SLEEP)
    return {
        "LD_PRELOAD": str(LIBFAKETIME),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "PYTHONPATH": str(folder),
    }
