"""The trainings of a benchmark: lines of JSON that are only ever added to, done by processes that may be cut."""

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

from filelock import FileLock


class HasKey(Protocol):
    @property
    def key(self) -> str: ...


Job = TypeVar("Job", bound=HasKey)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Whoever else appends waits."""
    path.parent.mkdir(exist_ok=True)
    with FileLock(path.parent / "lock"), path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def claim(folder: Path, jobs: Callable[[], Iterable[Job]], done: Callable[[], set[str]]) -> Job | None:
    """The first job that is neither done nor another living process's; a claim is a file with its number."""
    claims = folder / "claims"
    claims.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        ended = done()
        for job in jobs():
            path = claims / job.key.replace("/", "_")
            if job.key in ended:
                path.unlink(missing_ok=True)
            elif not (path.exists() and Path(f"/proc/{path.read_text()}").exists()):
                path.write_text(str(os.getpid()))
                return job
    return None


def jobs_of(path: Path, kind: type[Job]) -> list[Job]:
    """What is planned, or what is done: a run's row has more in it than its job."""
    return [kind(**{field.name: row[field.name] for field in fields(kind)}) for row in read(path)]


def work_off(
    path: Path, kind: type[Job], jobs: Callable[[], Iterable[Job]], run: Callable[[Job], dict[str, Any]]
) -> None:
    """Run what is not in the file yet and nobody is at, until there is nothing left; each result is a row of it."""
    while job := claim(path.parent, jobs, lambda: {done.key for done in jobs_of(path, kind)}):
        row = run(job)
        append(path, [row])
        print(json.dumps(row), flush=True)


def run_all(work: Callable[..., None], arguments: Iterable[tuple[Any, ...]]) -> bool:
    """A process for each of these arguments; whether all ended well."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=own) for own in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return not any(process.exitcode for process in processes)
