"""Open a study: sampler, pruner, and the rules that keep what is in it right.

One database holds several studies: the search, and beside it its confirmation, its retraining and the baselines. All of
them work alike: processes run `study.optimize` on a `SharedStudy`, which hands out each trial once and takes back those
whose process is gone.
"""

import contextlib
import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, RandomSampler
from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

from nas_mnist.data.datasets import DATASETS, MNIST, Dataset
from nas_mnist.errors import StudyError
from nas_mnist.study.jobs import job_of
from nas_mnist.study.ownership import OWNER, is_orphan, owner
from nas_mnist.study.storage import POLL_SECONDS, STORAGE_ERRORS, OnOutage, Storage, experimental, reason

MAX_RETRIES = 2  # of a trial whose process was killed

CONSTRAINT = "parameters"  # parameters − (limit − 1); feasible when ≤ 0

with experimental():
    _retry = RetryHeartbeatStaleTrialCallback(max_retry=MAX_RETRIES)


@dataclass(frozen=True)
class Identity:
    """What makes the results of a study comparable; a study of another identity is refused."""

    dataset: str
    max_params: int
    epochs: int
    train_images: int
    split: str
    optimizer: str
    space: str
    max_macs: int | None = None  # no limit, as in studies that were made before there was one
    max_ram: int | None = None


def create(storage: RDBStorage, name: str, *, metric: str, attributes: dict[str, Any]) -> None:
    """Make the study, which maximises `metric`, unless it is there, and compare its attributes.

    Raises `StudyError` if an attribute that is a dict (such as the identity) has other values in the stored study.
    """
    study = optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)
    with experimental():
        study.set_metric_names([metric])
    stored = study.user_attrs
    for key, value in attributes.items():
        if key not in stored:
            study.set_user_attr(key, value)
        elif isinstance(value, dict):
            _compare(name, stored[key], value)


def _compare(name: str, stored: dict[str, Any], asked: dict[str, Any]) -> None:
    for key, value in asked.items():
        if stored.get(key) != value:
            raise StudyError(
                f"study {name!r} was made with {key} {stored.get(key)!r}, not {value!r}; results of both cannot be "
                "compared: use the same value, or another --study"
            )


def names(storage: RDBStorage) -> list[str]:
    """The names of all studies in the storage."""
    return sorted(optuna.study.get_all_study_names(storage))


def is_ours(study: optuna.Study) -> bool:
    """Whether the study carries an identity: others may keep theirs in the same database."""
    return isinstance(study.user_attrs.get("identity"), dict)


def load(storage: RDBStorage, name: str) -> optuna.Study:
    """An existing study, to read. Raises `StudyError` with the names there are if this one is not."""
    try:
        return optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        there = ", ".join(names(storage)) or "none"
        raise StudyError(f"there is no study {name!r} in this storage (there: {there}): see --study") from None


def dataset_of(storage: Storage, name: str, asked: Dataset | None = None) -> Dataset:
    """The dataset of this study; if there is no such study yet, the one asked for, or else MNIST.

    Raises `StudyError` if the study is of another dataset than the one asked for.
    """
    identity = identity_of(storage, name)
    if identity is None:
        return asked or MNIST
    dataset = recorded_dataset(identity)
    if asked:
        _compare(name, {"dataset": dataset.name}, {"dataset": asked.name})
    return dataset


def identity_of(storage: Storage, name: str) -> dict[str, Any] | None:
    """What the study of this name was made with, empty if it was not written down; None if there is no such study."""
    if (storage.path and not storage.path.exists()) or name not in names(opened := storage.open()):
        return None
    return load(opened, name).user_attrs.get("identity", {})


def recorded_dataset(identity: dict[str, Any]) -> Dataset:
    return DATASETS[identity.get("dataset", MNIST.name)]


def find_trial(study: optuna.Study, number: int) -> FrozenTrial:
    """The trial of this number, which has drawn its architecture. Raises `StudyError` if there is none."""
    trials = study.get_trials(deepcopy=False)
    if not number < len(trials):
        raise StudyError(
            f"there is no trial {number} in study {study.study_name!r}, which has {len(trials)}, counted from 0: "
            "see `nas-mnist show`"
        )
    if "architecture" not in trials[number].user_attrs:
        raise StudyError(
            f"trial {number} has not drawn its network ({trials[number].state.name}): see `nas-mnist show`"
        )
    return trials[number]


@dataclass(frozen=True)
class Progress:
    """How many trials of a study are in which state. Trained means: one epoch at least, ended by itself or pruned."""

    trained: int
    pruned: int  # of the trained
    running: int
    waiting: int
    over_budget: int
    failed: int


def is_over_budget(trial: FrozenTrial) -> bool:
    return any(value > 0 for value in trial.constraints.values())


def is_trained(trial: FrozenTrial) -> bool:
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) and not is_over_budget(trial)


def progress(trials: list[FrozenTrial]) -> Progress:
    counts = {state: sum(trial.state == state for trial in trials) for state in TrialState}
    trained = [trial for trial in trials if is_trained(trial)]
    return Progress(
        trained=len(trained),
        pruned=sum(trial.state == TrialState.PRUNED for trial in trained),
        running=counts[TrialState.RUNNING],
        waiting=counts[TrialState.WAITING],
        over_budget=sum(trial.state == TrialState.PRUNED and is_over_budget(trial) for trial in trials),
        failed=counts[TrialState.FAIL],
    )


def count_trained(storage: RDBStorage, name: str) -> int | None:
    """The trained trials of a study; None if there is no such study."""
    return progress(load(storage, name).get_trials(deepcopy=False)).trained if name in names(storage) else None


class NoMoreTrials(Exception):
    """Raised by `SharedStudy.ask` when all there was to do is done."""


def until_trained(n_trials: int) -> Callable[[Progress], int]:
    """Demand of a search: trials that may start now, so that exactly `n_trials` are trained in the end."""
    return lambda now: n_trials - now.trained - now.running


Wanted = Callable[[FrozenTrial], bool]  # whether a failed trial is to be tried again


def any_trial(trial: FrozenTrial) -> bool:
    return True


MakeSampler = Callable[[int], BaseSampler]  # from a seed


class SharedStudy(optuna.Study):
    """A study that many processes work on: each trial is handed out once, and never one too many.

    `demand` says how many trials may start at the moment. When none may but some are running, `ask` waits, for one of
    them may fail. When none is running either, it raises `NoMoreTrials`. Failed trials that are `wanted` are tried
    again. Optuna itself counts trials for each process alone, and on SQLite two processes can be handed the same
    waiting trial.
    """

    def __init__(
        self,
        storage: Storage,
        name: str,
        *,
        demand: Callable[[Progress], int],
        seed: int,
        worker: int,
        pruner: BasePruner,
        sampler: MakeSampler = lambda seed: RandomSampler(seed),
        wanted: Wanted = any_trial,
        on_outage: OnOutage = lambda event: None,
    ):
        super().__init__(name, storage.open(on_outage=on_outage), pruner=pruner)
        self._lock = partial(storage.lock, on_outage)
        self._demand, self._wanted = demand, wanted
        self.waited_seconds = 0.0  # for trials of other workers, at the end
        # A seed of its own for each worker and each start, or all of them would draw the same first trials.
        entropy = np.random.SeedSequence([seed, worker, len(self.get_trials(deepcopy=False))])
        self.sampler = sampler(int(entropy.generate_state(1)[0]))

    def ask(self, fixed_distributions=None) -> optuna.Trial:
        while True:
            with self._lock():
                recover(self, self._wanted)
                now = progress(self.get_trials(deepcopy=False))
                if self._demand(now) > 0:
                    trial = super().ask(fixed_distributions)
                    self._storage.record_heartbeat(trial._trial_id)  # before the owner: without one it is an orphan
                    trial.set_user_attr(OWNER, owner())
                    return trial
            if now.running == 0:
                raise NoMoreTrials
            time.sleep(POLL_SECONDS)
            self.waited_seconds += POLL_SECONDS


def work_off(
    study: SharedStudy,
    objective: Callable[[optuna.Trial], float],
    on_end: Callable[[optuna.Study, FrozenTrial], None] = lambda study, trial: None,
) -> None:
    """Run the objective until the study has no more trials to hand out; `on_end` is called after each.

    Raises `ConnectionError` if the storage is lost in the middle; the trial is queued again once this process is gone.
    """

    try:
        study.optimize(objective, callbacks=[on_end])
    except NoMoreTrials:
        pass
    except STORAGE_ERRORS as error:
        raise ConnectionError(f"the storage failed; {reason(error)}") from error


def take_back(storage: Storage, name: str, wanted: Wanted = any_trial) -> None:
    """As `recover`, for what workers that were stopped have left; a server that is away leaves it to the next run."""
    with contextlib.suppress(StudyError, *STORAGE_ERRORS):
        found = load(storage.open(), name)
        with storage.lock():
            recover(found, wanted)


def recover(study: optuna.Study, wanted: Wanted = any_trial) -> int:
    """Fail the running trials whose process on this host is gone, and say how many there were.

    Those that failed and are `wanted` are queued again. The caller holds the storage's lock. Trials of other hosts are
    taken back when their heartbeat has stopped.
    """
    with experimental():
        optuna.storages.fail_stale_trials(study)
    orphans = [trial for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)) if is_orphan(trial)]
    for trial in orphans:
        study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    _queue_failed_again(study, wanted)
    return len(orphans)


def _queue_failed_again(study: optuna.Study, wanted: Wanted) -> None:
    """Queue the failed trials that were not yet, whoever failed them: we, the heartbeat, an error; at most twice each.

    Who is killed between failing a trial and queueing it leaves that to the next who comes here.
    """
    trials = study.get_trials(deepcopy=False)
    tried_again = {_retry_history(trial)[-1] for trial in trials if _retry_history(trial)}
    jobs = [job for trial in trials if trial.state != TrialState.FAIL and (job := job_of(trial))]
    for trial in trials:
        if (
            trial.state == TrialState.FAIL
            and wanted(trial)
            and trial.number not in tried_again
            and len(_retry_history(trial)) < MAX_RETRIES
            and job_of(trial) not in jobs
        ):
            _retry(study, _without_traces(trial))


def _retry_history(trial: FrozenTrial) -> list[int]:
    """The numbers of the failed trials that this one repeats, as `_retry` writes them."""
    return trial.system_attrs.get("retry_history", [])


def _without_traces(trial: FrozenTrial) -> FrozenTrial:
    """A copy without its owner, and without the files it may not have finished writing."""
    trial = copy.deepcopy(trial)
    trial.user_attrs = {key: value for key, value in trial.user_attrs.items() if key != OWNER}
    return trial
