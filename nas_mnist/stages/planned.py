"""Jobs: training runs that are known beforehand, each a trial of a study and done once.

A job that a trial stands for, finished, running or waiting, is never queued again, so the same command goes on where it
was stopped.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from nas_mnist.stages.trial import work_off
from nas_mnist.study import shared as study
from nas_mnist.study.jobs import Job, attributes_of, job_of
from nas_mnist.study.storage import Storage
from nas_mnist.workers.events import Send, Worker
from nas_mnist.workers.local import run_workers
from nas_mnist.workers.signals import stopped_once

Objective = Callable[[optuna.Trial, Job, Send], float]
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Queue:
    """Jobs in the order of their doing, and the study they are kept in.

    `identity` is what all jobs of the study have in common; a study of another identity is refused.
    """

    storage: Storage
    study_name: str
    metric: str
    identity: dict[str, Any]
    jobs: tuple[Job, ...]
    epochs_per_job: int

    def wants(self, trial: FrozenTrial) -> bool:
        """Whether the trial stands for one of these jobs."""
        return job_of(trial) in self.jobs


@dataclass(frozen=True)
class JobsBegan:
    """How many jobs there are to do, earlier ones not counted, and how many are done already."""

    n_left: int
    n_done: int
    epochs_per_job: int  # unless it is given up


@dataclass(frozen=True)
class JobStarted:
    """A worker began a job; `name` is what people call it."""

    trial: int
    name: str


def run_jobs(
    queue: Queue,
    prepare: Callable[[str], Objective],
    workers: list[Worker],
    on_event: Callable[[Worker | None, Any], None],
    *,
    pruner: optuna.pruners.BasePruner | None = None,
) -> list[FrozenTrial]:
    """Do what is left to do, and return the finished trials of these jobs, in the jobs' order.

    Each worker calls `prepare(device)` once and the objective it returns for each trial. Raises `KeyboardInterrupt`
    when stopped, finished jobs kept, and `StudyError` if the study is of another identity.
    """
    storage = queue.storage.open(create=True)
    with queue.storage.lock():
        study.create(storage, queue.study_name, metric=queue.metric, attributes={"identity": queue.identity})
        found = study.load(storage, queue.study_name)
        study.recover(found, queue.wants)
    n_done = len(finished(found, queue.jobs))
    n_left = len(queue.jobs) - n_done
    on_event(None, JobsBegan(n_left, n_done, queue.epochs_per_job))
    with stopped_once():
        try:
            if n_left:
                work = partial(_work, queue, prepare, pruner or optuna.pruners.NopPruner())
                run_workers(work, workers[:n_left], on_event)
        finally:
            # Tried again when the same command goes on: another one does only what it was asked for.
            study.take_back(queue.storage, queue.study_name, wanted=lambda trial: False)
    return finished(found, queue.jobs)


def finished(found: optuna.Study, jobs: Iterable[Job]) -> list[FrozenTrial]:
    """The trials that did these jobs, complete or pruned, in the jobs' order."""
    trials = [t for t in found.get_trials(deepcopy=False) if t.state in FINISHED]
    by_job = [next((t for t in trials if job_of(t) == job), None) for job in jobs]
    return [trial for trial in by_job if trial is not None]


def _work(queue: Queue, prepare: Callable[[str], Objective], pruner, worker: Worker, send: Send) -> None:
    """What one worker process does, from first to last."""
    objective = prepare(worker.device)
    shared = study.SharedStudy(
        queue.storage,
        queue.study_name,
        demand=lambda now: now.waiting or _queue_next(shared, queue.jobs),
        seed=0,
        worker=worker.index,
        pruner=pruner,
        wanted=queue.wants,
        on_outage=send,
    )
    work_off(shared, lambda trial, send: objective(trial, job_of(trial), send), send)


def _queue_next(found: optuna.Study, jobs: Iterable[Job]) -> int:
    """Queue the first job that no trial stands for, under the lock, and say how many there were: 1 or 0.

    One at a time, so that a command which is stopped leaves no more behind than the jobs that were running.
    """
    standing = (*FINISHED, TrialState.RUNNING, TrialState.WAITING)
    taken = [job_of(trial) for trial in found.get_trials(deepcopy=False, states=standing)]
    for job in jobs:
        if job not in taken:
            found.enqueue_trial({}, user_attrs=attributes_of(job))
            return 1
    return 0
