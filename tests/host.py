"""What one host of several does: `python host.py STORAGE TRIALS FOLDER [HOSTNAME]`, with two workers.

A trial takes a second and reports five times, and goes on reporting for as long as there is a file `hold` in the
folder: who is killed or cut off meanwhile is in the middle of it, however fast the machine is. Each start and end of
one is written down in the folder, beside the database, so that a test can see what really ran. HOSTNAME is for where a
name space of its own cannot be had.
"""

import itertools
import json
import os
import socket
import sys
import time
from functools import partial
from pathlib import Path

import optuna
from optuna.trial import FrozenTrial, TrialState

from nas_mnist.study import studies
from nas_mnist.study.records import TrialCounts
from nas_mnist.study.shared import SharedStudy, requeue, until_trained
from nas_mnist.study.storage import Storage
from nas_mnist.workers.events import Progress, Worker
from nas_mnist.workers.local import run_workers

HEARTBEAT_SECONDS, GRACE_SECONDS = 1, 10
N_REPORTS, REPORT_SECONDS = 5, 0.2
HOLD = "hold"


def objective(folder: Path, send, trial: optuna.Trial) -> float:
    (folder / f"{trial.number}-{os.getpid()}.started").touch()
    x = trial.suggest_float("x", 0, 1)
    for step in itertools.count(1):
        time.sleep(REPORT_SECONDS)
        trial.report(x, step)
        send(Progress())
        if step >= N_REPORTS and not (folder / HOLD).exists():
            break
    (folder / f"{trial.number}-{os.getpid()}.ended").touch()
    return x


def work(storage: Storage, n_trials: int, folder: Path, hostname: str | None, worker: Worker, send) -> None:
    if hostname:
        socket.gethostname = lambda: hostname
    shared = SharedStudy(
        storage,
        "s",
        n_may_start=until_trained(n_trials),
        seed=0,
        worker=worker.index,
        pruner=optuna.pruners.NopPruner(),
        on_outage=send,
    )
    shared.optimize(partial(objective, folder, send))


def main(url: str, n_trials: str, folder: str, hostname: str | None = None) -> None:
    storage = Storage(url, HEARTBEAT_SECONDS, GRACE_SECONDS)
    workers = [Worker(0, "cpu"), Worker(1, "cpu")]
    run_workers(partial(work, storage, int(n_trials), Path(folder), hostname), workers, lambda worker, event: None)
    requeue(storage, "s")
    print(json.dumps(TrialCounts.of(studies.load(storage.open(), "s").get_trials()).trained))


def wait_for(condition, seconds=180):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return found


def assert_each_ran_once(trials: list[FrozenTrial], folder: Path) -> None:
    """No trial was begun by two processes, and exactly those are complete that came to their end."""
    started = [int(path.name.partition("-")[0]) for path in folder.glob("*.started")]
    assert sorted(started) == sorted(set(started))
    ended = sorted(int(path.name.partition("-")[0]) for path in folder.glob("*.ended"))
    assert ended == [t.number for t in trials if t.state == TrialState.COMPLETE]


if __name__ == "__main__":
    main(*sys.argv[1:])
