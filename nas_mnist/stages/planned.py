"""Planned runs: trainings that are known beforehand, each a trial of a study and done once.

A run that a trial stands for, finished, running or waiting, is never queued again, so the same command goes on where it
was stopped.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from nas_mnist.data.folds import Split, search_split
from nas_mnist.data.images import load_test, load_train
from nas_mnist.stages.trial import work_off
from nas_mnist.study import studies
from nas_mnist.study.records import PlannedRun, planned_values
from nas_mnist.study.shared import SharedStudy, recover, requeue
from nas_mnist.study.storage import Storage
from nas_mnist.study.studies import StudyRef
from nas_mnist.workers.events import OnEvent, OnWorkerEvent, Worker
from nas_mnist.workers.local import run_workers
from nas_mnist.workers.signals import stopped_once

Run = TypeVar("Run", bound=PlannedRun)
Objective = Callable[[optuna.Trial, Run, OnEvent], float]
CPU = torch.device("cpu")
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Queue(Generic[Run]):
    """Runs in the order of their doing, all of one kind, and the study they are kept in.

    `identity` is what all runs of the study have in common; a study of another identity is refused.
    """

    storage: Storage
    study_name: str
    metric: str
    identity: dict[str, Any]
    kind: type[Run]
    runs: tuple[Run, ...]
    epochs_per_run: int

    def wants(self, trial: FrozenTrial) -> bool:
        """Whether the trial stands for one of these runs."""
        return any(run in self.runs for run, _ in runs_of(self.kind, [trial]))


@dataclass(frozen=True)
class RunsBegan:
    """How many runs there are to do, earlier ones not counted, and how many are done already."""

    n_left: int
    n_done: int
    epochs_per_run: int  # unless it is given up


@dataclass(frozen=True)
class RunStarted:
    """A worker began a run; `name` is what people call it."""

    trial: int
    name: str


def run_planned(
    queue: Queue[Run],
    prepare: Callable[[str], Objective[Run]],
    workers: list[Worker],
    on_event: OnWorkerEvent,
    *,
    pruner: optuna.pruners.BasePruner | None = None,
) -> list[FrozenTrial]:
    """Do what is left to do, and return the finished trials of these runs, in the runs' order.

    Each worker calls `prepare(device)` once and the objective it returns for each trial. Raises `KeyboardInterrupt`
    when stopped, finished runs kept, and `StudyError` if the study is of another identity.
    """
    storage = queue.storage.open(create=True)
    with queue.storage.lock():
        studies.create(storage, queue.study_name, metric=queue.metric, attributes={"identity": queue.identity})
        study = studies.load(storage, queue.study_name)
        recover(study, queue.wants)
    n_done = len(_finished(study, queue))
    n_left = len(queue.runs) - n_done
    on_event(None, RunsBegan(n_left, n_done, queue.epochs_per_run))
    with stopped_once():
        try:
            if n_left:
                work = partial(_work, queue, prepare, pruner or optuna.pruners.NopPruner())
                run_workers(work, workers[:n_left], on_event)
        finally:
            # Tried again when the same command goes on: another one does only what it was asked for.
            requeue(queue.storage, queue.study_name, wanted=lambda trial: False)
    return _finished(study, queue)


def _finished(study: optuna.Study, queue: Queue[Run]) -> list[FrozenTrial]:
    """The trials that did these runs, complete or pruned, in the runs' order."""
    done = runs_of(queue.kind, study.get_trials(deepcopy=False, states=FINISHED))
    by_run = [next((trial for other, trial in done if other == run), None) for run in queue.runs]
    return [trial for trial in by_run if trial is not None]


def runs_of(kind: type[Run], trials: Iterable[FrozenTrial]) -> list[tuple[Run, FrozenTrial]]:
    """Each trial that stands for a run, behind that run."""
    return [(kind(**values), trial) for trial in trials if (values := planned_values(trial))]


def _work(
    queue: Queue[Run],
    prepare: Callable[[str], Objective[Run]],
    pruner: optuna.pruners.BasePruner,
    worker: Worker,
    on_event: OnEvent,
) -> None:
    """What one worker process does, from first to last."""
    objective = prepare(worker.device)
    study = SharedStudy(
        queue.storage,
        queue.study_name,
        n_may_start=lambda now: now.waiting or _queue_next(study, queue),
        seed=0,
        worker=worker.index,
        pruner=pruner,
        wanted=queue.wants,
        on_outage=on_event,
    )
    work_off(study, lambda trial, on_event: objective(trial, queue.kind.of(trial), on_event), on_event)


def _queue_next(study: optuna.Study, queue: Queue[Run]) -> int:
    """Queue the first run that no trial stands for, under the lock, and say how many there were: 1 or 0.

    One at a time, so that a command which is stopped leaves no more behind than what was running.
    """
    standing = (*FINISHED, TrialState.RUNNING, TrialState.WAITING)
    taken = runs_of(queue.kind, study.get_trials(deepcopy=False, states=standing))
    for run in queue.runs:
        if not any(run == other for other, _ in taken):
            study.enqueue_trial({}, user_attrs=run.attributes())
            return 1
    return 0


def n_train_images(study: StudyRef) -> int:
    return study.train_images or study.dataset.n_train_images


def full_split(study: StudyRef, device: torch.device = CPU) -> Split:
    """All training images, or as many as the study is of; in the place of validation images the test set."""
    images = load_train(study.data_dir, study.dataset)
    if n_train_images(study) != len(images):
        images = search_split(images, n_train_images(study)).train
    return Split(images.to(device), load_test(study.data_dir, study.dataset).to(device))
