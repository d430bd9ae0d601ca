"""A PostgreSQL server of its own, from the distribution's packages, that a test may stop and restart as it likes.

Not pytest-postgresql, which does not run as root (containers do) and has no immediate restart.
"""

import glob
import itertools
import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import sqlalchemy

PASSWORD = "correct-horse"  # so that a test can look for it where it must not be


class Server:
    """Listens on a free port of 127.0.0.1; runs as the user `postgres` or `nobody` where the tests are root's.

    Without `fsync` what is written survives the end of the server, if not of the machine, and restarts are quick.
    """

    def __init__(self, binaries: Path, *, fsync: bool = False):
        self._binaries, self._numbers, self._fsync = binaries, itertools.count(), "on" if fsync else "off"
        self._folder = Path(tempfile.mkdtemp(prefix="nas-mnist-postgresql-"))
        self._user = None
        if os.geteuid() == 0:
            self._user = "postgres" if Path("/var/lib/postgresql").exists() else "nobody"
            shutil.chown(self._folder, self._user)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        secret = self._folder / "secret"
        secret.write_text(PASSWORD)
        secret.chmod(0o644)  # the folder is its owner's alone
        self._call("initdb", "--no-sync", "-D", self._data, "-U", "nas", "-A", "scram-sha-256", "--pwfile", secret)
        self.start()

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def start(self) -> None:
        settings = f"-c listen_addresses=127.0.0.1 -c unix_socket_directories={self._folder} -c fsync={self._fsync}"
        options = f"-p {self.port} {settings}"
        self._call("pg_ctl", "start", "-w", "-D", self._data, "-l", self._folder / "log", "-o", options)

    def stop(self) -> None:
        """As if its processes had been killed: no client is told, nothing is written down."""
        self._call("pg_ctl", "stop", "-w", "-D", self._data, "-m", "immediate")

    def restart(self) -> None:
        self.stop()
        self.start()

    def remove(self) -> None:
        self.stop()
        shutil.rmtree(self._folder)

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = f"study_{next(self._numbers)}"
        engine = sqlalchemy.create_engine(self.url("postgres"), poolclass=sqlalchemy.NullPool)
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        return self.url(name)

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://nas:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def _call(self, program: str, *arguments: str | Path) -> None:
        # The server outlives pg_ctl and must not hold on to a pipe of ours.
        output = self._folder / "output"
        with output.open("w") as file:
            result = subprocess.run(
                [self._binaries / program, *arguments],
                user=self._user,
                group=self._user,
                extra_groups=None if self._user is None else [],
                cwd=self._folder,
                stdout=file,
                stderr=subprocess.STDOUT,
                check=False,
            )
        if result.returncode:
            raise RuntimeError(f"{program} failed: {output.read_text()}")


def find_binaries() -> Path | None:
    """The folder of `initdb` and `pg_ctl`; Debian keeps them off the PATH. None if there is no server here."""
    folders = [os.path.dirname(shutil.which("initdb") or "")]
    folders += sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)
    found = (Path(folder) for folder in folders if folder and (Path(folder) / "pg_ctl").exists())
    return next(found, None)
