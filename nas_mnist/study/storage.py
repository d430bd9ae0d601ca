"""Where studies are kept: an SQLite file for one machine, a PostgreSQL database for many.

A storage opens connections that last, locks what processes must do one after another, and waits for a server that is
away. A password in its URL is never shown.
"""

import contextlib
import os
import sqlite3
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from filelock import FileLock
from optuna.storages import RDBStorage

from nas_mnist.errors import StudyError, explain, shown
from nas_mnist.files import folder_beside
from nas_mnist.study.ownership import is_of_this_host

LIBPQ_ARGUMENTS = {
    "connect_timeout": 10,  # seconds
    # A server that vanished without a word is noticed within a minute; the system alone would wait for a quarter hour.
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 60_000,  # milliseconds
    # Optuna stores heartbeats in local time: where the clock is put forward in spring, all trials would count as dead.
    "options": "-c timezone=UTC",
}
STORAGE_ERRORS = (sqlalchemy.exc.DBAPIError, optuna.exceptions.StorageInternalError)
LOCK_IDLE_SECONDS = 60  # the server ends a lock whose holder is silent, as that of a machine without power is
LOCK_TIMEOUT_SECONDS = 60  # SQLite's default of 5 s loses a report when another program holds the file
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Outage:
    """The server of the storage does not answer; the worker waits for it."""

    reason: str
    patience_seconds: int


@dataclass(frozen=True)
class OutageEnded:
    """The server answers again."""

    seconds: float


OnOutage = Callable[[Outage | OutageEnded], None]


@dataclass(frozen=True)
class Storage:
    """Where studies are kept: a SQLAlchemy URL of SQLite or PostgreSQL. `str()` hides its password."""

    url: str = field(repr=False)  # it may hold a password
    heartbeat_seconds: int = 30
    grace_seconds: int = 120  # without a heartbeat; then a trial of another host counts as dead
    read_only: bool = False  # an SQLite file stays as it is, byte for byte; it need not be writable

    @property
    def patience_seconds(self) -> int:
        """How long workers wait for a server that is away: when it is back, no living trial may look dead."""
        return self.grace_seconds - 2 * self.heartbeat_seconds

    @staticmethod
    def parse(text: str) -> "Storage":
        """From a SQLAlchemy URL, or the path of an SQLite file. Raises `StudyError` if it is neither."""
        try:
            if "://" not in text:  # a file may be called what it likes: ?, # and % have a meaning in a URL
                text = sqlalchemy.URL.create("sqlite", database=text).render_as_string()
            url = sqlalchemy.make_url(text)
            if url.host and text.count("@") > 1:
                raise StudyError(
                    "an @ in a storage's password is written %40, and in the rest of its URL too", "storage"
                )
            # A database in memory would be another one in every process; other servers have no lock that we know.
            in_memory = (url.database or ":memory:").startswith((":", "file:"))
            backend = url.get_backend_name()
            named = backend == "postgresql" or (backend == "sqlite" and not in_memory)
        except (sqlalchemy.exc.ArgumentError, ValueError):
            named = False
        if not named:
            raise StudyError(
                "a storage is a file name or a SQLAlchemy URL of SQLite or PostgreSQL, such as "
                "sqlite:///studies/nas_mnist.db or postgresql+psycopg://user@host/database: name one of these",
                "storage",
            )
        return Storage(text)

    def __str__(self) -> str:
        return self.path.as_posix() if self.path else shown(self._parsed.render_as_string(hide_password=True))

    @property
    def _parsed(self) -> sqlalchemy.URL:
        return sqlalchemy.make_url(self.url)

    @property
    def path(self) -> Path | None:
        """The file of an SQLite database, else None."""
        database = self._parsed.database
        return Path(database) if self._parsed.get_backend_name() == "sqlite" and database else None

    @property
    def artifacts(self) -> Path:
        """The folder of the files that belong to trials: beside an SQLite database, else below the current folder."""
        return (self.path.parent if self.path else Path("studies")) / "artifacts"

    def open(self, *, create: bool = False, on_outage: OnOutage | None = None) -> RDBStorage:
        """Connect; each process opens its own. Raises `StudyError` if that is not possible, now or later.

        Without `create`, a missing SQLite file is an error and nothing is written. With `on_outage`, a server that does
        not answer is waited for, now and later.
        """
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # its log would run through the display
        try:
            if self.path and not _is_database(self.path):
                self._create_file(create)
            if self.path and not (self.read_only or is_writable(self.path)):
                raise StudyError(
                    f"{self.path} and its folder must be writable: change their permissions or name another",
                    "storage",
                )
            # Two hosts that are the first would both make the tables.
            with contextlib.nullcontext() if self.path else self._advisory_lock("schema", on_outage):
                storage = self._connect(self.url, make_tables=self.path is None, keep=on_outage is not None)
        except (ModuleNotFoundError, sqlalchemy.exc.NoSuchModuleError, ImportError) as error:
            raise StudyError(
                f"the driver of storage {self} is not installed: pip install 'nas-mnist[postgresql]', or use SQLite"
            ) from error
        except (sqlalchemy.exc.SQLAlchemyError, *STORAGE_ERRORS, RuntimeError, OSError) as error:
            if on_outage is not None:  # it could be opened when the run began: another try will do
                raise ConnectionError(f"the storage failed; {reason(error)}") from error
            if advice := explain(error):
                raise StudyError(f"storage {self}: {advice}") from error
            raise StudyError(
                f"storage {self}: it must be a database that Optuna can open; {reason(error)}: name another", "storage"
            ) from error
        if self.path and not self.read_only:
            _make_sqlite_fast(storage)
        elif not self.path:
            self._wait_for_server(storage.engine, on_outage)
        return storage

    def _create_file(self, create: bool) -> None:
        """Optuna makes table after table; in a file of another name, so that whoever is killed leaves none or all."""
        if not create:
            raise StudyError(
                f"there is no study database at {self.path}: run `nas-mnist search` first, or name one", "storage"
            )
        _make_parent(self.path)
        place = self.path.resolve()  # through a link
        with self.lock(), folder_beside(place) as folder:
            if not _is_database(self.path):
                new = folder / "new.db"
                self._connect(Storage.parse(str(new)).url, make_tables=True, keep=False).engine.dispose()
                new.replace(place)

    def _connect(self, url: str, *, make_tables: bool, keep: bool) -> RDBStorage:
        """`keep` the connections to a server open between calls, as a worker wants; who only looks holds none."""
        if self.path and self.read_only:
            # Closed after each use, so that what SQLite keeps beside the file meanwhile is gone.
            engine_kwargs = {"creator": partial(connect_to_read, self.path), "poolclass": sqlalchemy.NullPool}
        elif self.path:
            engine_kwargs = {"connect_args": {"timeout": LOCK_TIMEOUT_SECONDS}}
        else:
            pool = {"pool_pre_ping": True} if keep else {"poolclass": sqlalchemy.NullPool}
            engine_kwargs = {"connect_args": self._server_arguments, **pool}
        with experimental():
            return _Storage(
                url.replace("{", "{{").replace("}", "}}"),  # it is a template of Optuna's
                engine_kwargs=engine_kwargs,
                heartbeat_interval=self.heartbeat_seconds,
                grace_period=self.grace_seconds,
                skip_table_creation=not make_tables,
            )

    @property
    def _server_arguments(self) -> dict[str, Any]:
        return LIBPQ_ARGUMENTS if self._parsed.get_driver_name() in ("psycopg", "psycopg2") else {}

    def lock(
        self, on_outage: OnOutage | None = None, *, purpose: str = "trials"
    ) -> contextlib.AbstractContextManager[None]:
        """Hold what every process must do one after another; released by the system if the process dies.

        Raises when a server that was restarted has lost the lock: what was done meanwhile may have been done twice.
        """
        if self.path:
            suffix = ".lock" if purpose == "trials" else f".{purpose}.lock"
            return FileLock(self.path.with_name(self.path.name + suffix))
        return self._advisory_lock(purpose, on_outage)

    @contextlib.contextmanager
    def _advisory_lock(self, name: str, on_outage: OnOutage | None) -> Iterator[None]:
        """A lock of the database, held by a transaction, so that a connection pooler may stand in between."""
        engine = sqlalchemy.create_engine(self.url, poolclass=sqlalchemy.NullPool, connect_args=self._server_arguments)
        self._wait_for_server(engine, on_outage)
        with _locked(engine, zlib.crc32(f"nas-mnist {name}".encode())) as connection:
            yield
            connection.commit()

    def _wait_for_server(self, engine: sqlalchemy.Engine, on_outage: OnOutage | None) -> None:
        """Let every new connection of the engine wait for the server, or fail with one clear line."""
        sqlalchemy.event.listen(engine, "do_connect", _PatientConnect(self, on_outage))


def _locked(engine: sqlalchemy.Engine, key: int) -> sqlalchemy.Connection:
    """A connection whose transaction holds the lock."""
    while True:
        connection = engine.connect()
        try:
            connection.execute(sqlalchemy.text("SELECT pg_advisory_xact_lock(:key)"), {"key": key})
            connection.exec_driver_sql(f"SET LOCAL idle_in_transaction_session_timeout = '{LOCK_IDLE_SECONDS}s'")
            return connection
        except sqlalchemy.exc.DBAPIError as error:
            connection.close()
            if not error.connection_invalidated:
                raise
            # The server was restarted while we stood in the queue, and nothing is lost: stand there again.


class _PatientConnect:
    """Connects an engine; with `on_outage`, waits for a server that is away, and says so once for each outage.

    Two threads come here, the one of the trial and that of its heartbeat, and either may be the first to be answered.
    """

    def __init__(self, storage: Storage, on_outage: OnOutage | None):
        self._storage, self._on_outage = storage, on_outage
        self._since: float | None = None  # kept when given up: who comes later does not wait once more
        self._told_since: float | None = None  # the outage that has been told of

    def __call__(self, dialect, _record, arguments, options):
        while True:
            try:
                connection = dialect.connect(*arguments, **options)
            except dialect.loaded_dbapi.OperationalError as error:
                self._wait(error)
            else:
                self._end()
                return connection

    def _wait(self, error: Exception) -> None:
        patience = self._storage.patience_seconds
        self._since = since = self._since or time.monotonic()
        if self._on_outage is None or time.monotonic() - since > patience:
            raise StudyError(
                f"storage {self._storage} cannot be reached; {reason(error)}: start its server, or name another",
                "storage",
            ) from error
        if self._told_since is None and _is_main_thread():  # the pipe that takes the event has no lock
            self._told_since = since
            self._on_outage(Outage(reason(error), patience))
        time.sleep(POLL_SECONDS)

    def _end(self) -> None:
        if self._told_since is not None and _is_main_thread():
            self._on_outage(OutageEnded(time.monotonic() - self._told_since))
            self._told_since = None
        self._since = None


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


@contextlib.contextmanager
def experimental() -> Iterator[None]:
    """Optuna warns that heartbeat, retry and Wilcoxon pruner are experimental; we know, and test what we rely on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


class _Storage(RDBStorage):
    """Heartbeats are for other hosts; on this one a process tells by itself that it lives, whatever the clock says.

    The clock jumps when it is set and when a machine has slept; the trials of living workers would be taken from them.
    """

    def record_heartbeat(self, trial_id: int) -> None:
        """Miss a beat if anything fails: Optuna's thread would end, and a living trial be taken for dead."""
        with contextlib.suppress(Exception):  # what is wrong the trial comes across itself
            super().record_heartbeat(trial_id)

    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        stale = super()._get_stale_trial_ids(study_id)
        return [id for id in stale if not is_of_this_host(self.get_trial(id))]


def _is_database(path: Path) -> bool:
    """False for a file that is missing or empty. Raises `StudyError` for one that is another program's, or damaged.

    Optuna would write its tables into any SQLite file.
    """
    if path.exists() and not path.is_file():
        raise StudyError(f"{path} must be a file, and is a folder or a device: name another", "storage")
    if not path.exists() or path.stat().st_size == 0:
        return False
    try:
        with contextlib.closing(connect_to_read(path)) as connection:
            tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            is_optunas = tables >= _OPTUNAS and all(
                connection.execute(f"SELECT count(*) FROM {name}").fetchone()[0] or name in ("studies", "trials")
                for name in _OPTUNAS
            )
            found = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if found != "ok":  # SQLite takes what was cut off for empty
                raise sqlite3.DatabaseError(found.replace("\n", " "))
    except sqlite3.Error as error:
        raise StudyError(f"{path} must be an Optuna database; SQLite says: {error}: name another", "storage") from error
    if tables and not is_optunas:
        raise StudyError(f"{path} must be an Optuna database, and is one of another program: name another", "storage")
    return bool(tables)


_OPTUNAS = {"studies", "trials", "version_info", "alembic_version"}  # tables; the last two are never empty


def is_writable(path: Path) -> bool:
    """The folder too, for SQLite keeps its log beside the file."""
    return os.access(path, os.W_OK) and os.access(path.resolve().parent, os.W_OK)


def connect_to_read(path: Path) -> sqlite3.Connection:
    """A connection that changes nothing.

    Where it may, it makes the index of the write-ahead log, and takes it away at its end. Where it may not, there is
    one if somebody else writes; else nobody does.
    """
    place, mode = path.resolve(), ""
    if not is_writable(path):
        mode = "?mode=ro" if place.with_name(f"{place.name}-shm").exists() else "?immutable=1"
    connection = sqlite3.connect(place.as_uri() + mode, uri=True, timeout=LOCK_TIMEOUT_SECONDS, check_same_thread=False)
    connection.execute("PRAGMA query_only = ON")
    return connection


def _make_parent(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(
            f"{path.parent} must be a folder that can be written ({error.strerror}): name another", "storage"
        ) from error
    if not os.access(path.parent, os.W_OK):
        raise StudyError(f"{path.parent} must be a folder that can be written: name another", "storage")


def _make_sqlite_fast(storage: RDBStorage) -> None:
    """Write-ahead log: readers never block writers, and more than twice the rate of reports."""

    @sqlalchemy.event.listens_for(storage.engine, "connect")
    def _set_pragmas(connection, _record):
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=NORMAL")

    storage.scoped_session.remove()
    storage.engine.dispose()  # the pooled connection was made before the listener


def reason(error: BaseException) -> str:
    """The first line of what the database said, without statement and password."""
    if isinstance(error, optuna.exceptions.StorageInternalError) and error.__cause__:
        error = error.__cause__  # it says no more than that the commit failed
    cause = getattr(error, "orig", None) or error
    return str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
