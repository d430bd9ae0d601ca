"""The reference systems trained with one common recipe, and some with their own, to compare with what was published.

They train on all training images and meet the test set after every epoch, as their authors' networks did; nothing is
chosen by it, and what counts is the last epoch. Each run is a trial of a study of its own: a run that is in it is never
repeated, and the dashboard shows them all.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from nas_mnist.data.datasets import MNIST, Dataset
from nas_mnist.data.folds import Split, search_split
from nas_mnist.data.images import load_test, load_train
from nas_mnist.data.unpacking import default_data_dir, prepare
from nas_mnist.model.network import Initialisation, build, count_parameters
from nas_mnist.model.zoo import ZOO, ReferenceSystem, find
from nas_mnist.stages.planned import JobStarted, Queue, run_jobs
from nas_mnist.stages.trial import record, train_and_report
from nas_mnist.study import shared as study
from nas_mnist.study.jobs import job_of
from nas_mnist.study.space import Candidate
from nas_mnist.study.storage import Storage
from nas_mnist.study.stored import distinctive
from nas_mnist.task import MAX_EPOCHS, N_FINAL_EPOCHS
from nas_mnist.training.augmentation import Augmentation
from nas_mnist.training.recipe import Recipe
from nas_mnist.workers.events import Send, Worker

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
class Job:
    """One run. A run of another line or recipe is another job, even under the same name.

    `own` is what the system's own training has other than the common one; empty for the common one.
    """

    system: str
    architecture: str
    seed: int
    epochs: int
    own: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As it is stored; without `own` where it is empty, as runs were stored before any had one."""
        return {key: value for key, value in asdict(self).items() if key != "own" or value}


@dataclass(frozen=True)
class BaselineSettings:
    """Which systems to train, how often and how long. Raises `ArchitectureError` for a name that is not in the zoo."""

    storage: Storage
    study_name: str = "nas-mnist-baselines"
    names: tuple[str, ...] = tuple(ZOO)
    n_seeds: int = 1
    epochs: int = MAX_EPOCHS
    train_images: int | None = None  # None: all
    data_dir: Path = field(default_factory=default_data_dir)
    dataset: Dataset = MNIST

    def __post_init__(self):
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
        return {"dataset": self.dataset.name, "train_images": self.n_train_images, **recipe}

    @property
    def n_train_images(self) -> int:
        return self.train_images or self.dataset.n_train_images

    @property
    def jobs(self) -> list[Job]:
        """The first seed of every system, then the second: a run that is stopped early has seen them all."""
        return [
            Job(name, str(ZOO[name].architecture), seed, self.epochs, training.own)
            for seed in range(self.n_seeds)
            for name in dict.fromkeys(self.names)
            for training in trainings(name)
        ]


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
        return self.mean - self.published if self.runs and self.published else None


def train_baselines(
    settings: BaselineSettings, workers: list[Worker], on_event: Callable[[Worker | None, Any], None]
) -> tuple[BaselineResult, ...]:
    """Train what is missing, and return what all runs of these systems have come to.

    Raises `KeyboardInterrupt` when stopped, finished runs kept; `StudyError` if the study is of another recipe.
    """
    prepare(settings.data_dir, settings.dataset)
    _split(settings)
    jobs = tuple(job.to_dict() for job in settings.jobs)
    queue = Queue(settings.storage, settings.study_name, "test accuracy", settings.identity, jobs, settings.epochs)
    run_jobs(queue, partial(_prepare, settings), workers, on_event)
    return results(settings)


def results(settings: BaselineSettings) -> tuple[BaselineResult, ...]:
    """What is in the study of the systems asked for, trained for as many epochs; in the zoo's order."""
    found = study.load(settings.storage.open(), settings.study_name)
    trials = found.get_trials(deepcopy=False)
    return tuple(
        _result(ZOO[name], training, settings, trials)
        for name in ZOO
        if name in settings.names
        for training in trainings(name)
    )


def _result(
    system: ReferenceSystem, training: Training, settings: BaselineSettings, trials: Iterable[FrozenTrial]
) -> BaselineResult:
    job = Job(system.name, str(system.architecture), 0, settings.epochs, training.own)
    own = [trial for trial in trials if (done := _job(trial)) and replace(done, seed=job.seed) == job]
    runs = [
        BaselineRun(
            _job(trial).seed,
            tuple(trial.intermediate_values[epoch] for epoch in sorted(trial.intermediate_values)),
            **{name: trial.user_attrs[name] for name in ("seconds", "device", "versions")},
        )
        for trial in own
        if trial.state == TrialState.COMPLETE
    ]
    n_diverged = sum(trial.state == TrialState.PRUNED for trial in own)
    runs.sort(key=lambda run: run.seed)
    training = replace(training, recipe=replace(training.recipe, epochs=settings.epochs))
    return BaselineResult(system, training, tuple(runs), n_diverged, settings.dataset)


def _job(trial: FrozenTrial) -> Job | None:
    job = job_of(trial)
    return Job(**job) if job else None


def _split(settings: BaselineSettings) -> Split:
    """All images to train on and, instead of validation images, the test set."""
    images = load_train(settings.data_dir, settings.dataset)
    if settings.n_train_images != len(images):
        images = search_split(images, settings.n_train_images).train
    return Split(images, load_test(settings.data_dir, settings.dataset))


def _prepare(settings: BaselineSettings, device_name: str) -> Callable[[optuna.Trial, dict[str, Any], Send], float]:
    """What a worker does for each run, with the images on its device."""
    device = torch.device(device_name)
    split = _split(settings)
    return partial(_train, settings, Split(split.train.to(device), split.val.to(device)), device)


def _train(
    settings: BaselineSettings,
    split: Split,
    device: torch.device,
    trial: optuna.Trial,
    job: dict[str, Any],
    send: Send,
) -> float:
    """One run, from its job to the test accuracy of its last epoch."""
    job = Job(**job)
    system = ZOO[job.system]
    training = OWN_TRAINING[job.system] if job.own else Training(RECIPE)
    recipe = replace(training.recipe, epochs=job.epochs)
    record(trial, Candidate(system.architecture, recipe), count_parameters(system.architecture), job.seed, device)
    trial.set_user_attr("system", system.name)
    if settings.dataset == MNIST:
        trial.set_user_attr("published_accuracy", system.published_accuracy)
    send(JobStarted(trial.number, f"{system.name}{' (own recipe)' if job.own else ''} seed {job.seed}"))
    network = build(system.architecture, seed=job.seed, device=device, initialisation=training.initialisation)
    return train_and_report(trial, network, recipe, split, job.seed, send)[-1].val_accuracy
