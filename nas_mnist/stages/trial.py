"""One trial, from sampling to result, and the loop that works a study off; who watches is told of every epoch."""

import math
import platform
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from typing import Any, Literal, get_args

import numpy as np
import optuna
import torch
from optuna.trial import FrozenTrial

from nas_mnist.data.folds import Split
from nas_mnist.errors import StudyError, TrainingDiverged
from nas_mnist.model.architecture import NO_LIMITS, Architecture, Limits
from nas_mnist.model.network import Network, build, count_parameters
from nas_mnist.study import space
from nas_mnist.study.artifacts import Artifacts
from nas_mnist.study.pruner import AVERAGED_EPOCHS, RUNGS, SHORT_EPOCHS, SHORT_RUN
from nas_mnist.study.records import (
    TrialRecord,
    how_far,
    is_over_budget,
    leaderboard,
    write_candidate,
    write_epochs,
    write_excess,
    write_origin,
    write_reason,
    write_short_run,
    written,
)
from nas_mnist.study.shared import SharedStudy
from nas_mnist.study.space import Candidate
from nas_mnist.study.studies import StudyRef
from nas_mnist.task import MAX_EPOCHS, MAX_PARAMS
from nas_mnist.training.evaluation import final_accuracy, find_mistakes
from nas_mnist.training.loop import EpochResult, train
from nas_mnist.training.recipe import Optimizer, Recipe
from nas_mnist.workers.events import Completed, OnEvent, Progress
from nas_mnist.workers.machine import processor


@dataclass(frozen=True)
class TrialStarted:
    """A worker began to train a candidate."""

    trial: int
    architecture: str
    n_parameters: int


@dataclass(frozen=True)
class EpochTrained(Progress):
    """An epoch has ended and is stored, or, in a short run, all of them since the one before."""

    trial: int
    epoch: EpochResult
    of: int  # epochs of this training, which may be a trial's short run


@dataclass(frozen=True)
class TrialEnded(Completed):
    """A trial is over and stored: trained to the end, pruned, or over the budget."""

    trial: int
    over_budget: bool
    stopped: str  # where, if it was pruned
    accuracy: float | None  # the objective; None if it was pruned


@dataclass(frozen=True)
class WorkerDone:
    """Where a worker's time went: in training and validation, and altogether, start-up and waiting at the end apart."""

    training_seconds: float
    total_seconds: float


Sampler = Literal["evolution", "tpe", "random"]  # what proposes candidates


@dataclass(frozen=True, kw_only=True)
class TrialSettings(StudyRef):
    """What the trials of a search have in common. Raises `StudyError` for an optimizer or a sampler there is not."""

    max_params: int = MAX_PARAMS  # a network has fewer
    limits: Limits = NO_LIMITS
    epochs: int = MAX_EPOCHS
    prune: bool = True
    optimizer: Optimizer = space.RECIPE.optimizer
    seed: int = 0
    sampler: Sampler = "evolution"
    keep_weights: int = 5  # candidates, the best

    def __post_init__(self) -> None:
        choices = {"optimizer": tuple(space.LEARNING_RATES), "sampler": get_args(Sampler)}
        for name, there in choices.items():
            if (asked := getattr(self, name)) not in there:
                raise StudyError(f"there is no {name} {asked!r}: choose one of {', '.join(there)}", name)

    @property
    def reference_recipe(self) -> Recipe:
        """What warm starts are trained with, and random draws about."""
        return space.reference_recipe(self.optimizer, self.epochs, self.max_params)

    def admits(self, architecture: Architecture) -> bool:
        """Whether it is within the budget."""
        return architecture.n_parameters < self.max_params and self.limits.admit(architecture)

    @property
    def has_short_runs(self) -> bool:
        """Whether every trial begins with one."""
        return self.prune and self.epochs > SHORT_EPOCHS


def to_candidate(settings: TrialSettings, parameters: Mapping[str, Any]) -> Candidate:
    """What the parameters denote within the budget and the limits of this search."""
    return space.to_candidate(
        parameters,
        max_params=settings.max_params,
        epochs=settings.epochs,
        optimizer=settings.optimizer,
        limits=settings.limits,
    )


def work_off(study: SharedStudy, objective: Callable[[optuna.Trial, OnEvent], float], on_event: OnEvent) -> None:
    """Run the objective in this worker until the study has nothing left to hand out, and tell how it goes."""
    training_seconds = 0.0

    def timed(event: Any) -> None:
        nonlocal training_seconds
        if isinstance(event, EpochTrained):
            training_seconds += event.epoch.train_seconds + event.epoch.eval_seconds
        on_event(event)

    start = time.perf_counter()
    study.optimize(lambda trial: objective(trial, timed), callbacks=[lambda _, trial: on_event(_ended(trial))])
    on_event(WorkerDone(training_seconds, time.perf_counter() - start - study.waited_seconds))


def _ended(trial: FrozenTrial) -> TrialEnded:
    """Optuna gives a pruned trial its last report as its value, which is no objective."""
    complete = trial.state == optuna.trial.TrialState.COMPLETE
    accuracy = trial.value if complete else None
    return TrialEnded(trial.number, is_over_budget(trial), how_far(trial), accuracy)


def objective(
    trial: optuna.Trial, settings: TrialSettings, split: Split, device: torch.device, on_event: OnEvent
) -> float:
    """One trial from sampling to result: the mean validation accuracy of its last two epochs.

    Raises `optuna.TrialPruned` for a candidate over the budget, which is never trained, for one that cannot win any
    more, and for one whose loss is not finite.
    """
    parameters = space.suggest(trial, settings.optimizer)
    candidate = to_candidate(settings, parameters)
    n_parameters = count_parameters(candidate.architecture)
    if settings.sampler != "evolution" and not TrialRecord.from_trial(trial).origin:
        write_origin(trial, f"drawn by {settings.sampler}")
    seed = int(np.random.SeedSequence([settings.seed, trial.number]).generate_state(1)[0])
    write_excess(trial, n_parameters, settings.max_params, settings.limits.excess(candidate.architecture))
    record(trial, candidate, n_parameters, seed, device)
    if over := TrialRecord.from_trial(trial).excess:
        raise optuna.TrialPruned(f"over the budget of {', '.join(over)}")
    on_event(TrialStarted(trial.number, str(candidate.architecture), n_parameters))
    if settings.has_short_runs:
        _run_short(trial, candidate, split, seed, device, on_event)
    network = build(candidate.architecture, seed=seed, device=device)
    averaged = AVERAGED_EPOCHS if settings.prune else ()
    epochs = train_and_report(trial, network, candidate.recipe, split, seed, on_event, averaged_epochs=averaged)
    accuracy = final_accuracy([epoch.eval_accuracy for epoch in epochs])
    if _is_among_the_best(accuracy, trial.study, settings.keep_weights):
        artifacts = Artifacts(trial.study, settings.storage.artifacts)
        artifacts.add_weights(trial, network)
        artifacts.add_mistakes(trial, find_mistakes(network, split.val))
    return accuracy


def _is_among_the_best(accuracy: float, study: optuna.Study, n: int) -> bool:
    return sum(written(trial.value) >= accuracy for trial in leaderboard(study.get_trials(deepcopy=False))) < n


def record(
    trial: optuna.Trial, candidate: Candidate, n_parameters: int, seed: int | None, device: torch.device
) -> None:
    """Write down what is going to be trained, and on what."""
    write_candidate(trial, candidate, n_parameters, seed, device_name(device), versions())


def _run_short(
    trial: optuna.Trial, candidate: Candidate, split: Split, seed: int, device: torch.device, on_event: OnEvent
) -> None:
    """A complete schedule of few epochs, of a network that is not kept: what it comes to says which are worth all.

    Raises `optuna.TrialPruned` where others of late did better, also if a loss is not finite.
    """
    network = build(candidate.architecture, seed=seed, device=device)
    recipe = replace(candidate.recipe, epochs=SHORT_EPOCHS)
    judged_epochs = [SHORT_EPOCHS + rung for rung in RUNGS if rung <= SHORT_RUN]  # no others, which nobody reads
    judged: list[EpochResult] = []
    with _pruned_if_diverged(trial):
        for epoch in train(network, recipe, split.train, split.val, seed=seed, judged_epochs=judged_epochs):
            if not math.isfinite(epoch.eval_loss):
                raise TrainingDiverged(f"the validation loss was {epoch.eval_loss} in its short run")
            judged.append(epoch)
            write_short_run(trial, judged)
            on_event(EpochTrained(trial.number, epoch, of=SHORT_EPOCHS))
            if epoch.number == SHORT_EPOCHS:
                trial.report(epoch.eval_accuracy, SHORT_RUN)
            if trial.should_prune():
                raise optuna.TrialPruned("others did better in their short runs")


def train_and_report(
    trial: optuna.Trial,
    network: Network,
    recipe: Recipe,
    split: Split,
    seed: int,
    on_event: OnEvent,
    averaged_epochs: Collection[int] = (),
) -> list[EpochResult]:
    """Train to the last epoch, or until the study's pruner has seen enough; every epoch is stored as it ends.

    Raises `optuna.TrialPruned`, also if the loss is not finite; then its record says so.
    """
    epochs: list[EpochResult] = []
    with _pruned_if_diverged(trial):
        for epoch in train(network, recipe, split.train, split.val, seed=seed, averaged_epochs=averaged_epochs):
            epochs.append(epoch)
            write_epochs(trial, epochs)
            trial.report(epoch.eval_accuracy, epoch.number)
            on_event(EpochTrained(trial.number, epoch, of=recipe.epochs))
            if epoch.number < recipe.epochs and trial.should_prune():
                raise optuna.TrialPruned("cannot win any more")
    return epochs


@contextmanager
def _pruned_if_diverged(trial: optuna.Trial) -> Iterator[None]:
    try:
        yield
    except TrainingDiverged as error:
        write_reason(trial, str(error))
        raise optuna.TrialPruned(str(error)) from None


@cache
def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor()


@cache
def versions() -> str:
    packages = ("nas-mnist", "torch", "optuna")
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)])
