"""A copy of a database that must stay as it is, for who wants to add to it what they show."""

import contextlib
import shutil
import sqlite3
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from nas_mnist.study.storage import Storage, connect_to_read, is_writable


def reason_to_copy(storage: Storage) -> str | None:
    """Why this database must stay as it is; None if it may be changed, as one of a server may."""
    path = storage.path
    if path is None or not path.exists():
        return None
    if not is_writable(path):
        return "it cannot be written"
    return "git tracks it" if _is_tracked(path.resolve()) else None


def _is_tracked(path: Path) -> bool:
    """Whether git knows this file; without git, it does not."""
    if shutil.which("git") is None:
        return False
    # Also where the folder is another user's; but nothing that its configuration names is run.
    trust = ("-c", "safe.directory=*", "-c", "core.fsmonitor=false")
    command = ["git", *trust, "-C", str(path.parent), "ls-files", "--error-unmatch", "--", f":(literal){path.name}"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def copied(storage: Storage) -> Iterator[Storage]:
    """A copy of this SQLite database, and links to its files, in a folder that is there only within."""
    with tempfile.TemporaryDirectory(prefix="nas-mnist-") as folder:
        copy = Storage.parse(str(Path(folder, storage.path.name)))
        with (
            contextlib.closing(connect_to_read(storage.path)) as source,
            contextlib.closing(sqlite3.connect(copy.path)) as target,
        ):
            source.backup(target)
        copy.artifacts.mkdir()
        if storage.artifacts.is_dir():
            for file in storage.artifacts.resolve().iterdir():
                (copy.artifacts / file.name).symlink_to(file)
        yield copy
