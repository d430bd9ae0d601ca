"""A study that processes share, and the rules that keep what is in it right.

Search, confirmation, retraining and baselines all work alike: processes run `optimize` on a `SharedStudy`, which hands
out each trial once and queues again those whose process is gone.
"""

import contextlib
import copy
import time
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler, RandomSampler
from optuna.storages import RetryHeartbeatStaleTrialCallback
from optuna.trial import FrozenTrial, TrialState

from nas_mnist.errors import StudyError
from nas_mnist.study.ownership import OWNER, is_orphan, owner
from nas_mnist.study.records import RESULTS, TrialCounts, planned_values
from nas_mnist.study.storage import POLL_SECONDS, STORAGE_ERRORS, OnOutage, Storage, experimental, reason
from nas_mnist.study.studies import load

MAX_RETRIES = 2  # of a trial whose process was killed

with experimental():
    _retry = RetryHeartbeatStaleTrialCallback(max_retry=MAX_RETRIES)


class NoMoreTrials(Exception):
    """Raised by `SharedStudy.ask` when all there was to do is done."""


def until_trained(n_trials: int) -> Callable[[TrialCounts], int]:
    """For a search: trials that may start now, so that exactly `n_trials` are trained in the end."""
    return lambda now: n_trials - now.trained - now.running


Wanted = Callable[[FrozenTrial], bool]  # whether a failed trial is to be tried again


def any_trial(trial: FrozenTrial) -> bool:
    return True


MakeSampler = Callable[[int], BaseSampler]  # from a seed


class SharedStudy(optuna.Study):
    """A study that many processes work on: each trial is handed out once, and never one too many.

    `n_may_start` says how many trials may start now. When none may but some are running, `ask` waits, for one of them
    may fail. When none is running either, it raises `NoMoreTrials`. Failed trials that are `wanted` are tried again.
    Optuna itself counts trials for each process alone, and on SQLite two processes can be handed the same waiting
    trial.
    """

    def __init__(
        self,
        storage: Storage,
        name: str,
        *,
        n_may_start: Callable[[TrialCounts], int],
        seed: int,
        worker: int,
        pruner: BasePruner,
        sampler: MakeSampler = lambda seed: RandomSampler(seed),
        wanted: Wanted = any_trial,
        on_outage: OnOutage = lambda event: None,
    ):
        super().__init__(name, storage.open(on_outage=on_outage), pruner=pruner)
        self._lock = partial(storage.lock, on_outage)
        self._n_may_start, self._wanted = n_may_start, wanted
        self.waited_seconds = 0.0  # for trials of other workers, at the end
        # A seed of its own for each worker and each start, or all of them would draw the same first trials.
        entropy = np.random.SeedSequence([seed, worker, len(self.get_trials(deepcopy=False))])
        self.sampler = sampler(int(entropy.generate_state(1)[0]))

    def ask(self, fixed_distributions=None) -> optuna.Trial:
        while True:
            with self._lock():
                recover(self, self._wanted)
                now = TrialCounts.of(self.get_trials(deepcopy=False))
                if self._n_may_start(now) > 0:
                    trial = super().ask(fixed_distributions)
                    self._storage.record_heartbeat(trial._trial_id)  # before the owner: without one it is an orphan
                    trial.set_user_attr(OWNER, owner())
                    return trial
            if now.running == 0:
                raise NoMoreTrials
            time.sleep(POLL_SECONDS)
            self.waited_seconds += POLL_SECONDS

    def optimize(
        self,
        func: Callable[[optuna.Trial], float],
        callbacks: Iterable[Callable[[optuna.Study, FrozenTrial], None]] = (),
    ) -> None:
        """As Optuna's, until there are no more trials to hand out.

        Raises `ConnectionError` if the storage is lost in the middle; the trial is queued again once this process is
        gone.
        """
        try:
            super().optimize(func, callbacks=callbacks)
        except NoMoreTrials:
            pass
        except STORAGE_ERRORS as error:
            raise ConnectionError(f"the storage failed; {reason(error)}") from error


def requeue(storage: Storage, name: str, wanted: Wanted = any_trial) -> None:
    """As `recover`, for what workers that were stopped have left; a server that is away leaves it to the next run."""
    with contextlib.suppress(StudyError, *STORAGE_ERRORS):
        study = load(storage.open(), name)
        with storage.lock():
            recover(study, wanted)


def recover(study: optuna.Study, wanted: Wanted = any_trial) -> int:
    """Fail the running trials whose process on this host is gone, and say how many there were.

    Those that failed and are `wanted` are queued again. The caller holds the storage's lock. Trials of other hosts are
    queued again when their heartbeat has stopped.
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
    standing = [run for trial in trials if trial.state != TrialState.FAIL and (run := planned_values(trial))]
    for trial in trials:
        if (
            trial.state == TrialState.FAIL
            and wanted(trial)
            and trial.number not in tried_again
            and len(_retry_history(trial)) < MAX_RETRIES
            and planned_values(trial) not in standing
        ):
            _retry(study, _without_traces(trial))


def _retry_history(trial: FrozenTrial) -> list[int]:
    """The numbers of the failed trials that this one repeats, as `_retry` writes them."""
    return trial.system_attrs.get("retry_history", [])


def _without_traces(trial: FrozenTrial) -> FrozenTrial:
    """A copy without its owner, and without what it was trained: it begins anew, and must not be taken for further."""
    trial = copy.deepcopy(trial)
    trial.user_attrs = {key: value for key, value in trial.user_attrs.items() if key not in (OWNER, *RESULTS)}
    return trial
