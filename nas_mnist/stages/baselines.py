"""The reference systems trained with one common recipe, and some with their own, to compare with what was published.

They train on all training images and meet the test set after every epoch, as their authors' networks did; nothing is
chosen by it, and what counts is the last epoch. Each run is a trial of a study of its own: a run that is in it is never
repeated, and the dashboard shows them all.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import mean, stdev
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from nas_mnist.data.datasets import MNIST, Dataset
from nas_mnist.data.folds import Split
from nas_mnist.data.unpacking import prepare
from nas_mnist.model.network import Initialisation, build, count_parameters
from nas_mnist.model.zoo import ZOO, ReferenceSystem, find
from nas_mnist.stages.planned import Objective, Queue, RunStarted, full_split, n_train_images, run_planned, runs_of
from nas_mnist.stages.trial import record, train_and_report
from nas_mnist.study.records import PlannedRun, TrialRecord, write_system, written
from nas_mnist.study.space import Candidate
from nas_mnist.study.stored import distinctive
from nas_mnist.study.studies import StudyRef
from nas_mnist.task import MAX_EPOCHS, N_FINAL_EPOCHS
from nas_mnist.training.augmentation import Augmentation
from nas_mnist.training.recipe import Recipe
from nas_mnist.workers.events import OnEvent, OnWorkerEvent, Worker

# One for all ten. With batch norm a maximum rate of 0.1 and one of 0.3 come out alike; without it, in lite-m1, classes
# die at 0.2: its logits go through a ReLU, and a class whose logit is 0 on every image has no gradient to come back by.
# Norms keep their running statistics, as their authors' did.
RECIPE = Recipe(learning_rate=0.1)


@dataclass(frozen=True)
class Training:
    """How a system is trained, from its first weights on."""

    recipe: Recipe
    initialisation: Initialisation = "default"

    @property
    def own(self) -> dict[str, Any]:
        """What it has other than the common one, as it is stored; empty for the common one."""
        common = {"initialisation": "default", **asdict(RECIPE)}
        values = {"initialisation": self.initialisation, **asdict(self.recipe)}
        return {name: value for name, value in values.items() if name != "epochs" and value != common[name]}


# For the systems that the common recipe does not bring to what was published.
OWN_TRAINING = {
    # OneCycleLR as it is by default, with this rate, and rotation. Theirs also takes the momentum from 0.95 to 0.85 and
    # back, and crops a tenth of the images.
    "era1a7": Training(
        Recipe(learning_rate=1.0, weight_decay=0.0, warmup_fraction=0.3, augmentation=Augmentation(15.0, 0.0, 0.0, 0.0))
    ),
    # Not augmented, as published; the rate is ours, and so are the first weights: with PyTorch's some of the classes
    # have no gradient from the start, or lose it in the first hundred steps, whatever the rate and the optimizer.
    "lite-m1": Training(
        Recipe(learning_rate=0.03, weight_decay=0.0, augmentation=Augmentation(0.0, 0.0, 0.0, 0.0)), "positive"
    ),
}


def trainings(name: str) -> tuple[Training, ...]:
    """With the common recipe, and as the system's own if it has one."""
    common = Training(RECIPE)
    return (common, OWN_TRAINING[name]) if name in OWN_TRAINING else (common,)


@dataclass(frozen=True)
class PlannedBaseline(PlannedRun):
    """A system with one seed."""

    system: str  # by name
    architecture: str
    seed: int
    epochs: int
    own: dict[str, Any] | None = None  # what its own training has other than the common one


@dataclass(frozen=True, kw_only=True)
class BaselineSettings(StudyRef):
    """Which systems to train, how often and how long. Raises `ArchitectureError` for a name that is not in the zoo."""

    study_name: str = "nas-mnist-baselines"
    names: tuple[str, ...] = tuple(ZOO)
    n_seeds: int = 1
    epochs: int = MAX_EPOCHS

    def __post_init__(self) -> None:
        for name in self.names:
            find(name)

    @property
    def recipe(self) -> Recipe:
        return replace(RECIPE, epochs=self.epochs)

    @property
    def identity(self) -> dict[str, Any]:
        """What the runs of a study have in common; a study of another identity is refused."""
        recipe = distinctive(RECIPE)
        del recipe["epochs"]
        return {"dataset": self.dataset.name, "train_images": n_train_images(self), **recipe}

    @property
    def queue(self) -> Queue[PlannedBaseline]:
        """The first seed of every system, then the second: a run that is stopped early has seen them all.

        A run of another line or recipe is another run, even under the same name.
        """
        runs = tuple(
            planned(ZOO[name], training, seed, self.epochs)
            for seed in range(self.n_seeds)
            for name in dict.fromkeys(self.names)
            for training in trainings(name)
        )
        return Queue(self.storage, self.study_name, "test accuracy", self.identity, PlannedBaseline, runs, self.epochs)


@dataclass(frozen=True)
class BaselineRun:
    """One finished run: the test accuracy after each epoch, as a fraction."""

    seed: int
    accuracies: tuple[float, ...]
    seconds: float  # of training and testing
    device: str
    versions: str

    @property
    def worst_of_last(self) -> float:
        return min(self.accuracies[-N_FINAL_EPOCHS:])


@dataclass(frozen=True)
class BaselineResult:
    """What a system reaches by one training, over all the runs there are. Accuracies are of the last epoch."""

    system: ReferenceSystem
    training: Training
    runs: tuple[BaselineRun, ...]
    n_diverged: int
    dataset: Dataset = MNIST

    @property
    def published(self) -> float | None:
        """What was published is of MNIST."""
        return self.system.published_accuracy if self.dataset == MNIST else None

    @property
    def mean(self) -> float | None:
        return mean(run.accuracies[-1] for run in self.runs) if self.runs else None

    @property
    def standard_deviation(self) -> float | None:
        """Between seeds; None for fewer than two."""
        return stdev(run.accuracies[-1] for run in self.runs) if len(self.runs) > 1 else None

    @property
    def worst_of_last(self) -> float | None:
        """The worst of the last two epochs of any run."""
        return min((run.worst_of_last for run in self.runs), default=None)

    @property
    def seconds(self) -> float | None:
        return mean(run.seconds for run in self.runs) if self.runs else None

    @property
    def difference(self) -> float | None:
        """Mean minus published, as a fraction; None if there is nothing to compare."""
        return None if self.mean is None or self.published is None else self.mean - self.published


def train_baselines(
    settings: BaselineSettings, workers: list[Worker], on_event: OnWorkerEvent
) -> tuple[BaselineResult, ...]:
    """Train what is missing, and return what all runs of these systems have come to.

    Raises `KeyboardInterrupt` when stopped, finished runs kept; `StudyError` if the study is of another recipe.
    """
    prepare(settings.data_dir, settings.dataset)
    full_split(settings)
    run_planned(settings.queue, partial(_prepare, settings), workers, on_event)
    return results(settings)


def results(settings: BaselineSettings) -> tuple[BaselineResult, ...]:
    """What is in the study of the systems asked for, trained for as many epochs; in the zoo's order."""
    trials = settings.load().get_trials(deepcopy=False)
    return tuple(
        _result(ZOO[name], training, settings, trials)
        for name in ZOO
        if name in settings.names
        for training in trainings(name)
    )


def planned(system: ReferenceSystem, training: Training, seed: int, epochs: int) -> PlannedBaseline:
    """The run of a system with the common recipe, or with its own."""
    return PlannedBaseline(system.name, str(system.architecture), seed, epochs, training.own or None)


def _result(
    system: ReferenceSystem, training: Training, settings: BaselineSettings, trials: Iterable[FrozenTrial]
) -> BaselineResult:
    ended = runs_of(PlannedBaseline, trials)
    own = [trial for run, trial in ended if planned(system, training, run.seed, settings.epochs) == run]
    runs = [_run(trial) for trial in own if trial.state == TrialState.COMPLETE]
    n_diverged = sum(trial.state == TrialState.PRUNED for trial in own)
    runs.sort(key=lambda run: run.seed)
    training = replace(training, recipe=replace(training.recipe, epochs=settings.epochs))
    return BaselineResult(system, training, tuple(runs), n_diverged, settings.dataset)


def _run(trial: FrozenTrial) -> BaselineRun:
    record = TrialRecord.from_trial(trial)
    accuracies = tuple(trial.intermediate_values[epoch] for epoch in sorted(trial.intermediate_values))
    seed = PlannedBaseline.of(trial).seed
    return BaselineRun(seed, accuracies, record.seconds, written(record.device), written(record.versions))


def _prepare(settings: BaselineSettings, device_name: str) -> Objective[PlannedBaseline]:
    """What a worker does for each run, with the images on its device."""
    device = torch.device(device_name)
    return partial(_train, settings, full_split(settings, device), device)


def _train(
    settings: BaselineSettings,
    split: Split,
    device: torch.device,
    trial: optuna.Trial,
    run: PlannedBaseline,
    on_event: OnEvent,
) -> float:
    """One run, from its plan to the test accuracy of its last epoch."""
    system = ZOO[run.system]
    training = OWN_TRAINING[run.system] if run.own else Training(RECIPE)
    recipe = replace(training.recipe, epochs=run.epochs)
    record(trial, Candidate(system.architecture, recipe), count_parameters(system.architecture), run.seed, device)
    write_system(trial, system.name, system.published_accuracy if settings.dataset == MNIST else None)
    on_event(RunStarted(trial.number, f"{system.name}{' (own recipe)' if run.own else ''} seed {run.seed}"))
    network = build(system.architecture, seed=run.seed, device=device, initialisation=training.initialisation)
    return train_and_report(trial, network, recipe, split, run.seed, on_event)[-1].eval_accuracy
