"""The best candidates of a search once more, on fresh folds and seeds: a search's best score is partly luck.

Every candidate is trained on the same (fold, seed) pairs, so that candidates are compared pair by pair. One that is
hopelessly behind the best is given up by a paired test (Optuna's WilcoxonPruner), and so is one whose training
diverges, which counts as an accuracy of 0.
"""

from dataclasses import asdict, dataclass
from functools import partial
from statistics import mean, stdev
from typing import Any

import optuna
import torch
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import wilcoxon

from nas_mnist.data.folds import CONFIRM_PARTITION, Split, check_number, fold, n_fold_images, spread
from nas_mnist.data.images import Images, load_train
from nas_mnist.data.unpacking import prepare
from nas_mnist.errors import StudyError, TrainingDiverged
from nas_mnist.model.network import build, count_parameters
from nas_mnist.stages.planned import Objective, Queue, RunStarted, run_planned
from nas_mnist.stages.trial import EpochTrained, record
from nas_mnist.study import studies
from nas_mnist.study.records import (
    PlannedRun,
    TrialRecord,
    leaderboard,
    write_accuracies,
    write_pairs,
    write_reason,
    written,
)
from nas_mnist.study.space import Candidate
from nas_mnist.study.storage import experimental
from nas_mnist.study.studies import StudyRef
from nas_mnist.training.evaluation import final_accuracy
from nas_mnist.training.loop import train
from nas_mnist.workers.events import OnEvent, OnWorkerEvent, Worker

GIVE_UP_P = 0.1  # one-sided: a candidate that is behind the best with less doubt than this is given up
PAIRS_BEFORE_GIVING_UP = 3
SIGNIFICANT_P = 0.05


@dataclass(frozen=True)
class PlannedConfirmation(PlannedRun):
    """A candidate on all pairs."""

    trial: int  # of the search
    search_score: float
    candidate: Candidate


@dataclass(frozen=True, kw_only=True)
class ConfirmSettings(StudyRef):
    """Which candidates to confirm and how thoroughly; kept in `<study>-confirm`, beside the search.

    The study is the search; `train_images` are of each fold.
    """

    top: int = 8
    n_folds: int = 6
    n_seeds: int = 1

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """(fold, seed), every fold with the first seed before the second: comparable however early it ends."""
        return [(k, seed) for seed in range(self.n_seeds) for k in range(self.n_folds)]

    def split(self, images: Images, number: int) -> Split:
        """This fold held out, and of the others as many images as are asked for."""
        split = fold(images, number, partition=CONFIRM_PARTITION, n_folds=self.n_folds)
        return split if self.train_images is None else Split(spread(split.train, self.train_images), split.val)


@dataclass(frozen=True)
class Confirmed:
    """A candidate's accuracies on fresh folds and seeds, as fractions, in the order of the pairs."""

    trial: int  # of the search
    architecture: str
    n_parameters: int
    search_score: float
    accuracies: tuple[float, ...]
    folds: int
    seeds: int
    given_up: bool

    @property
    def mean(self) -> float:
        return mean(self.accuracies)

    @property
    def standard_deviation(self) -> float | None:
        """Between pairs; None for fewer than two."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else None

    @property
    def optimism(self) -> float:
        """How much better the search believed it to be."""
        return self.search_score - self.mean

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; accuracies as fractions."""
        derived = {
            "mean": self.mean,
            "standard_deviation": self.standard_deviation,
            "n": len(self.accuracies),
            "optimism": self.optimism,
        }
        return asdict(self) | {"accuracies": list(self.accuracies)} | derived


def confirm(settings: ConfirmSettings, workers: list[Worker], on_event: OnWorkerEvent) -> list[Confirmed]:
    """Train the best candidates on every pair that is missing, and rank them by their mean.

    Raises `StudyError` if the search has no finished candidate or is of another dataset, or if it was confirmed with
    other folds; `DataError` for more images than a fold has. Nothing is written then.
    """
    check_train_images(settings)
    study = settings.load()
    studies.dataset_of(settings.storage, settings.study_name, settings.dataset)
    best = leaderboard(study.get_trials(deepcopy=False))[: settings.top]
    if not best:
        raise StudyError(
            f"study {settings.study_name!r} has no finished candidate to confirm: run `nas-mnist search` first"
        )
    prepare(settings.data_dir, settings.dataset)
    with experimental():
        pruner = optuna.pruners.WilcoxonPruner(p_threshold=GIVE_UP_P, n_startup_steps=PAIRS_BEFORE_GIVING_UP)
    run_planned(_queue(settings, best), partial(_prepare, settings), workers, on_event, pruner=pruner)
    return ranking(settings.storage.open(), settings.study_name)


def check_train_images(settings: ConfirmSettings) -> None:
    """Raise `DataError` if there are not as many images to train on as asked for, whichever fold is held out."""
    if settings.train_images is not None:
        check_number(settings.train_images, n_fold_images(settings.dataset, settings.n_folds))


def ranking(storage: RDBStorage, study_name: str) -> list[Confirmed]:
    """All confirmed candidates of a search, the best mean first and those given up behind; empty if there are none."""
    name = f"{study_name}-confirm"
    if name not in studies.names(storage):
        return []
    trials = studies.load(storage, name).get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return sorted((_confirmed(trial) for trial in trials), key=lambda c: (c.given_up, -c.mean))


def lead(first: Confirmed, second: Confirmed) -> float | None:
    """The p-value that `first` is ahead of `second` by chance: one-sided Wilcoxon test over their common pairs.

    None if they have no pair in which they differ.
    """
    n = min(len(first.accuracies), len(second.accuracies))
    differences = [a - b for a, b in zip(first.accuracies[:n], second.accuracies[:n], strict=True)]
    return float(wilcoxon(differences, alternative="greater").pvalue) if any(differences) else None


def _queue(settings: ConfirmSettings, best: tuple[FrozenTrial, ...]) -> Queue[PlannedConfirmation]:
    runs = tuple(PlannedConfirmation(t.number, written(t.value), TrialRecord.from_trial(t).candidate) for t in best)
    identity = {
        "dataset": settings.dataset.name,
        "folds": settings.n_folds,
        "seeds": settings.n_seeds,
        "train_images": settings.train_images,
        "partition": CONFIRM_PARTITION,
    }
    if settings.train_images is not None:  # before there was this selection more were trained on than were recorded
        identity["selection"] = "evenly spread"
    n_epochs = len(settings.pairs) * max(run.candidate.recipe.epochs for run in runs)
    name = f"{settings.study_name}-confirm"
    return Queue(settings.storage, name, "mean validation accuracy", identity, PlannedConfirmation, runs, n_epochs)


def _confirmed(trial: FrozenTrial) -> Confirmed:
    run, record = PlannedConfirmation.of(trial), TrialRecord.from_trial(trial)
    return Confirmed(
        trial=run.trial,
        architecture=written(record.architecture),
        n_parameters=written(record.n_parameters),
        search_score=run.search_score,
        accuracies=record.accuracies,
        folds=written(record.folds),
        seeds=written(record.seeds),
        given_up=trial.state == TrialState.PRUNED,
    )


def _prepare(settings: ConfirmSettings, device_name: str) -> Objective[PlannedConfirmation]:
    device = torch.device(device_name)
    return partial(_train, settings, load_train(settings.data_dir, settings.dataset).to(device), device)


def _train(
    settings: ConfirmSettings,
    images: Images,
    device: torch.device,
    trial: optuna.Trial,
    run: PlannedConfirmation,
    on_event: OnEvent,
) -> float:
    """One candidate on every pair; a retried trial brings the accuracies of the pairs it had finished along."""
    candidate = run.candidate
    record(trial, candidate, count_parameters(candidate.architecture), None, device)
    write_pairs(trial, settings.n_folds, settings.n_seeds)
    accuracies = list(TrialRecord.from_trial(trial).accuracies)
    for step, (number, seed) in enumerate(settings.pairs):
        on_event(RunStarted(trial.number, f"trial {run.trial}, fold {number + 1}, seed {seed}"))
        if step == len(accuracies):
            try:
                accuracies.append(_train_pair(settings, candidate, images, number, seed, trial.number, on_event))
            except TrainingDiverged as error:
                write_accuracies(trial, [*accuracies, 0.0])
                write_reason(trial, str(error))
                raise optuna.TrialPruned(str(error)) from None
            write_accuracies(trial, accuracies)
        trial.report(accuracies[step], step)
        if step + 1 < len(settings.pairs) and trial.should_prune():
            raise optuna.TrialPruned("behind the best candidate")
    return mean(accuracies)


def _train_pair(
    settings: ConfirmSettings,
    candidate: Candidate,
    images: Images,
    number: int,
    seed: int,
    trial: int,
    on_event: OnEvent,
) -> float:
    """The objective of the search on one fold: the mean validation accuracy of the last two epochs."""
    split = settings.split(images, number)
    network = build(candidate.architecture, seed=seed, device=images.labels.device)
    val_accuracies = []
    for epoch in train(network, candidate.recipe, split.train, split.val, seed=seed):
        val_accuracies.append(epoch.eval_accuracy)
        on_event(EpochTrained(trial, epoch, of=candidate.recipe.epochs))
    return final_accuracy(val_accuracies)
