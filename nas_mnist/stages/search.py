"""The search: worker processes that draw candidates, train them, and report every epoch to the study."""

import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import optuna
import torch
from optuna.samplers import RandomSampler
from optuna.trial import FrozenTrial

from nas_mnist.data.datasets import MNIST
from nas_mnist.data.folds import N_FOLDS, SEARCH_PARTITION, Split, n_search_images, search_split
from nas_mnist.data.images import load_train
from nas_mnist.data.unpacking import prepare
from nas_mnist.errors import ArchitectureError, BudgetError
from nas_mnist.model import zoo
from nas_mnist.model.architecture import NO_LIMITS, Architecture, Limits
from nas_mnist.stages.trial import TrialSettings, WorkerDone, objective, to_candidate, work_off
from nas_mnist.study import space, studies
from nas_mnist.study.pruner import RungPruner, best_first
from nas_mnist.study.records import TrialCounts, TrialRecord, is_trained, leaderboard, n_epochs, warm_start_attributes
from nas_mnist.study.sampler import EvolutionSampler, decided
from nas_mnist.study.shared import SharedStudy, recover, requeue, until_trained
from nas_mnist.study.space import Candidate, Parameters
from nas_mnist.study.storage import experimental
from nas_mnist.training.recipe import Recipe
from nas_mnist.workers.events import OnEvent, OnWorkerEvent, Worker, tee
from nas_mnist.workers.local import run_workers
from nas_mnist.workers.signals import stopped_once

COMMAND = "command"  # attribute of the study: the last that worked on it
N_TRIALS = "n_trials"  # attribute of the study: how many trained trials it shall have, by that command
KEEP_WEIGHTS = "keep_weights"  # attribute of the study: of how many candidates weights and pictures are kept


@dataclass(frozen=True, kw_only=True)
class SearchSettings(TrialSettings):
    """What a search is asked to do."""

    n_trials: int = 100  # trained trials in the study when it is done, earlier runs counted in
    warm_start: bool = True

    @property
    def identity(self) -> studies.Identity:
        return studies.Identity(
            dataset=self.dataset.name,
            max_params=self.max_params,
            epochs=self.epochs,
            train_images=self.train_images or n_search_images(self.dataset),
            split=f"fold 0 of {N_FOLDS}, partition {SEARCH_PARTITION}",
            optimizer=self.optimizer,
            space=space.fingerprint(self.optimizer),
            **asdict(self.limits),
        )

    @property
    def command(self) -> str:
        """The command that asks for this, as people may see it."""
        plain = SearchSettings(self.storage)
        options = {
            "storage": str(self.storage),
            "study": self.study_name,
            "trials": self.n_trials,
            "max-params": self.max_params,
            "max-macs": self.limits.max_macs,
            "max-ram": self.limits.max_ram,
            "epochs": self.epochs,
            "train-images": self.train_images,
            "dataset": self.dataset.name,
            "optimizer": self.optimizer,
            "sampler": self.sampler,
            "seed": self.seed,
            "keep-weights": self.keep_weights,
        }
        names = ("max-params", "epochs", "optimizer", "sampler", "seed", "keep-weights")
        usual = {name: getattr(plain, name.replace("-", "_")) for name in names}
        usual |= {"study": self.dataset.study, "train-images": None, "dataset": MNIST.name}
        usual |= {"max-macs": None, "max-ram": None}
        words = [word for name, v in options.items() if v != usual.get(name, "") for word in (f"--{name}", str(v))]
        switches = [f"--no-{name}" for name, on in (("prune", self.prune), ("warm-start", self.warm_start)) if not on]
        return shlex.join(["nas-mnist", "search", *words, *switches])


@dataclass(frozen=True)
class SearchBegan:
    """What earlier runs left in the study: how many trials are trained, and the best of them."""

    n_trained: int
    best: FrozenTrial | None


@dataclass(frozen=True)
class Summary:
    """What a search has come to. Epochs are those of the whole study; seconds are this run's."""

    counts: TrialCounts
    epochs_trained: int
    epochs_saved: int  # by pruning
    best: tuple[FrozenTrial, ...]
    seconds: float
    overhead: float | None  # share of the workers' time outside training; None if no worker trained and finished


def search(
    settings: SearchSettings,
    workers: list[Worker],
    on_event: OnWorkerEvent,
    run: Callable[..., None] = run_workers,
    starts: Mapping[str, Parameters] | None = None,
) -> Summary:
    """Search until the study has `n_trials` trained trials. Events of all workers reach `on_event`.

    `run` is `run_workers`, or what does the same on other machines. `starts` are tried after the reference systems,
    each once.

    Raises `KeyboardInterrupt` when stopped; what was finished is kept, what was running is queued again.
    Raises `BudgetError`, `DataError` or `StudyError` before anything is written.
    """
    start = time.perf_counter()
    check_budget(settings.max_params, settings.limits)
    prepare(settings.data_dir, settings.dataset)
    search_split(load_train(settings.data_dir, settings.dataset), settings.train_images)
    _prepare_study(settings, starts)
    trials = settings.load().get_trials(deepcopy=False)
    n_trained = TrialCounts.of(trials).trained
    on_event(None, SearchBegan(n_trained, next(iter(leaderboard(trials)), None)))
    times: list[WorkerDone] = []
    n_left = settings.n_trials - n_trained
    with stopped_once():
        try:
            if n_left > 0:
                run(partial(_work, settings), workers[:n_left], tee(partial(_keep_time, times), on_event))
        finally:
            requeue(settings.storage, settings.study_name)
    return summarise(settings, time.perf_counter() - start, times)


def _keep_time(times: list[WorkerDone], worker: Worker | None, event: Any) -> None:
    if isinstance(event, WorkerDone):
        times.append(event)


def check_budget(max_params: int, limits: Limits = NO_LIMITS) -> None:
    """Raise `BudgetError` if no network of the space has fewer than `max_params` parameters, or is within a limit."""
    smallest = space.smallest_count()
    if smallest >= max_params:
        raise BudgetError(
            f"a budget of fewer than {max_params:,} parameters cannot be met; the smallest network of the space has "
            f"{smallest:,}: give {smallest + 1} or more",
            "max_params",
        )
    _check_limit("max_macs", limits.max_macs, "multiply-adds", lambda architecture: architecture.n_macs)
    _check_limit("max_ram", limits.max_ram, "bytes of RAM", lambda architecture: architecture.ram)


def _check_limit(name: str, limit: int | None, what: str, measure: Callable[[Architecture], int]) -> None:
    smallest = space.smallest(measure)
    if limit is not None and smallest > limit:
        raise BudgetError(
            f"a budget of {limit:,} {what} cannot be met; the smallest network of the space takes {smallest:,}: "
            "allow as many or more",
            name,
        )


def summarise(settings: SearchSettings, seconds: float, times: list[WorkerDone]) -> Summary:
    trials = settings.load().get_trials(deepcopy=False)
    trained = [trial for trial in trials if is_trained(trial)]
    epochs = sum(n_epochs(trial) for trial in trained)
    training, total = sum(t.training_seconds for t in times), sum(t.total_seconds for t in times)
    return Summary(
        counts=TrialCounts.of(trials),
        epochs_trained=epochs,
        epochs_saved=max(0, len(trained) * settings.epochs - epochs),
        best=leaderboard(trials)[:5],
        seconds=seconds,
        overhead=1 - training / total if training else None,
    )


def leaderboard_entry(trial: FrozenTrial) -> dict[str, Any]:
    """What `show --json` prints of a trial: accuracy as a fraction, times in seconds, one result for each epoch."""
    return {"trial": trial.number, "accuracy": trial.value, **trial.user_attrs}


def pruner(settings: SearchSettings) -> optuna.pruners.BasePruner:
    return RungPruner() if settings.prune else optuna.pruners.NopPruner()


def sampler(settings: SearchSettings, seed: int) -> optuna.samplers.BaseSampler:
    """What proposes candidates; all but ours are there to be compared with, and draw the same kind of networks."""
    ranges, same = space.distributions(settings.optimizer), decided(settings.dataset)
    if settings.sampler == "evolution":
        of, recipe = partial(to_candidate, settings), settings.reference_recipe
        return EvolutionSampler(ranges, of, recipe, same, settings.admits, best_first, seed)
    others = {"tpe": optuna.samplers.TPESampler(seed=seed, n_startup_trials=20), "random": RandomSampler(seed)}
    with experimental():
        return optuna.samplers.PartialFixedSampler(same, others[settings.sampler])


def _prepare_study(settings: SearchSettings, starts: Mapping[str, Parameters] | None = None) -> None:
    storage = settings.storage.open(create=True)
    with settings.storage.lock():
        studies.create(
            storage,
            settings.study_name,
            metric="validation accuracy",
            attributes={"identity": asdict(settings.identity)},
        )
        study = studies.load(storage, settings.study_name)
        for name, value in (
            (KEEP_WEIGHTS, settings.keep_weights),
            (N_TRIALS, settings.n_trials),
            (COMMAND, settings.command),
        ):
            study.set_user_attr(name, value)
        recover(study)  # what is queued again comes first
        _queue_starts(study, settings, starts or {})


def _queue_starts(study: optuna.Study, settings: SearchSettings, starts: Mapping[str, Parameters]) -> None:
    """Queue the warm starts that were not tried, but no more than may still be trained: they would wait for good.

    A later search for more trials queues the rest.
    """
    trials = study.get_trials(deepcopy=False)
    now = TrialCounts.of(trials)
    room = settings.n_trials - now.trained - now.running - now.waiting
    if room <= 0:
        return
    references = _references(settings) if settings.warm_start else {}
    there = {TrialRecord.from_trial(trial).reference for trial in trials}
    left = {n: p for n, p in _different({**references, **starts}, settings).items() if n not in there}
    for name, parameters in islice(left.items(), room):
        study.enqueue_trial(parameters, user_attrs=warm_start_attributes(name))


def is_finished(study: optuna.Study) -> bool:
    """Whether a search has all the trials that it was last asked for.

    Earlier versions did not write down how many, and queued more than would be trained; of theirs what runs counts.
    """
    now = TrialCounts.of(study.get_trials(deepcopy=False))
    return now.running == 0 and now.trained >= study.user_attrs.get(N_TRIALS, 0)


def _different(starts: Mapping[str, Parameters], settings: SearchSettings) -> dict[str, Parameters]:
    """The first of those that come to the same candidate, if that is within the budget."""
    first: dict[Candidate, str] = {}
    for name, parameters in starts.items():
        candidate = to_candidate(settings, parameters)
        fits = candidate.architecture.n_parameters < settings.max_params
        if fits and settings.limits.admit(candidate.architecture):
            first.setdefault(candidate, name)
    return {name: starts[name] for name in first.values()}


def _references(settings: SearchSettings) -> dict[str, Parameters]:
    return reference_parameters(settings.max_params, settings.reference_recipe)


def reference_parameters(max_params: int, recipe: Recipe) -> dict[str, Parameters]:
    """The reference systems that are points of the space, in its order of norm and ReLU, each with this recipe.

    Those over the budget are narrowed to it, and left out if that cannot be.
    """
    points = {}
    for name, system in zoo.ZOO.items():
        architecture = replace(system.architecture, norm_first=True, elementwise_dropout=False)
        try:
            parameters = space.to_parameters(Candidate(architecture, recipe), max_params)
        except ArchitectureError:
            continue
        fitting = space.to_candidate(
            parameters, max_params=max_params, epochs=recipe.epochs, optimizer=recipe.optimizer
        ).architecture
        if fitting.n_parameters < max_params:
            points[name if fitting == architecture else f"{name}, narrowed"] = parameters
    return points


def _work(settings: SearchSettings, worker: Worker, on_event: OnEvent) -> None:
    """What one worker process does, from first to last."""
    device = torch.device(worker.device)
    prepare(settings.data_dir, settings.dataset)  # on another node of a cluster it may be the first
    split = search_split(load_train(settings.data_dir, settings.dataset), settings.train_images)
    split = Split(split.train.to(device), split.val.to(device))
    study = SharedStudy(
        settings.storage,
        settings.study_name,
        n_may_start=until_trained(settings.n_trials),
        seed=settings.seed,
        worker=worker.index,
        pruner=pruner(settings),
        sampler=partial(sampler, settings),
        on_outage=on_event,
    )
    work_off(study, lambda trial, on_event: objective(trial, settings, split, device, on_event), on_event)
