"""The chosen candidate, trained on all training images with several seeds; only here does it meet the test set.

The test set is evaluated after every epoch for the record. What counts is the last epoch, never the best one, and the
weights that are exported are those of the first seed, not of the best.
"""

from dataclasses import dataclass
from functools import partial
from statistics import mean, stdev
from typing import Any

import optuna
import torch
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from nas_mnist.data.datasets import MNIST, Dataset
from nas_mnist.data.folds import Split
from nas_mnist.data.unpacking import prepare
from nas_mnist.errors import BudgetError, StudyError
from nas_mnist.model.network import build, count_parameters
from nas_mnist.stages import confirm
from nas_mnist.stages.planned import (
    FINISHED,
    Objective,
    Queue,
    RunStarted,
    full_split,
    n_train_images,
    run_planned,
    runs_of,
)
from nas_mnist.stages.trial import record, train_and_report
from nas_mnist.study import studies
from nas_mnist.study.artifacts import Artifacts
from nas_mnist.study.records import PlannedRun, TrialRecord, write_chosen, written
from nas_mnist.study.space import Candidate
from nas_mnist.study.storage import Storage
from nas_mnist.study.studies import StudyRef
from nas_mnist.task import MAX_EPOCHS, MAX_PARAMS, N_FINAL_EPOCHS, TARGET_ACCURACY
from nas_mnist.training.loop import EpochResult
from nas_mnist.workers.events import OnEvent, OnWorkerEvent, Worker


@dataclass(frozen=True)
class Run:
    """One seed. In its epochs `eval_loss` and `eval_accuracy` are of the test set."""

    seed: int
    epochs: tuple[EpochResult, ...]
    seconds: float
    device: str
    versions: str

    @property
    def accuracy(self) -> float:
        """Test accuracy of the last epoch, as a fraction."""
        return self.epochs[-1].eval_accuracy

    @property
    def worst_of_last(self) -> float:
        """The worse of the last two epochs."""
        return min(epoch.eval_accuracy for epoch in self.epochs[-N_FINAL_EPOCHS:])


@dataclass(frozen=True)
class Verdict:
    """Whether the task is fulfilled, and by how much."""

    n_parameters: int
    n_epochs: int
    worst_of_last: float  # over all seeds
    n_diverged: int = 0  # seeds that came to no accuracy at all
    of_the_task: bool = True  # on MNIST; on another dataset nothing can fulfil it

    @property
    def few_parameters(self) -> bool:
        return self.n_parameters < MAX_PARAMS

    @property
    def few_epochs(self) -> bool:
        return self.n_epochs <= MAX_EPOCHS

    @property
    def accurate(self) -> bool:
        return self.worst_of_last >= TARGET_ACCURACY

    @property
    def every_seed(self) -> bool:
        return self.n_diverged == 0

    @property
    def fulfilled(self) -> bool | None:
        """None on another dataset than that of the task."""
        return bool(self) if self.of_the_task else None

    def __bool__(self) -> bool:
        return self.of_the_task and self.few_parameters and self.few_epochs and self.accurate and self.every_seed


@dataclass(frozen=True)
class Retrained:
    """A candidate and all its runs on all training images, or on fewer for a quick look."""

    candidate: Candidate
    trial: int | None  # of the search; None for an architecture that was named
    search_score: float | None
    confirmation: dict[str, Any] | None
    runs: tuple[Run, ...]  # by seed, those that diverged left out
    weights: dict[str, Tensor]  # of the first of them; none where only the results were asked for
    diverged: tuple[int, ...] = ()  # seeds
    n_train_images: int = MNIST.n_train_images
    dataset: Dataset = MNIST

    @property
    def mean(self) -> float:
        return mean(run.accuracy for run in self.runs)

    @property
    def standard_deviation(self) -> float | None:
        """Between seeds; None for fewer than two."""
        return stdev(run.accuracy for run in self.runs) if len(self.runs) > 1 else None

    @property
    def verdict(self) -> Verdict:
        return Verdict(
            count_parameters(self.candidate.architecture),
            max(len(run.epochs) for run in self.runs),
            min(run.worst_of_last for run in self.runs),
            len(self.diverged),
            self.dataset == MNIST,
        )


@dataclass(frozen=True)
class Chosen:
    """The candidate to retrain, and how it was found."""

    candidate: Candidate
    trial: int | None = None
    search_score: float | None = None
    confirmation: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        return "architecture" if self.trial is None else f"trial {self.trial}"


@dataclass(frozen=True)
class PlannedSeed(PlannedRun):
    """A candidate with one seed."""

    candidate: Candidate
    seed: int


Ended = list[tuple[PlannedSeed, FrozenTrial]]


@dataclass(frozen=True, kw_only=True)
class RetrainSettings(StudyRef):
    """What to retrain, how often, and where the results are kept: in `<study>-retrain`, beside the search."""

    chosen: Chosen
    n_seeds: int = 5

    @property
    def retrain_study(self) -> str:
        return f"{self.study_name}-retrain"

    @property
    def queue(self) -> Queue[PlannedSeed]:
        candidate = self.chosen.candidate
        runs = tuple(PlannedSeed(candidate, seed) for seed in range(self.n_seeds))
        identity = {"dataset": self.dataset.name, "train_images": n_train_images(self)}
        n_epochs = candidate.recipe.epochs
        return Queue(self.storage, self.retrain_study, "test accuracy", identity, PlannedSeed, runs, n_epochs)


def choose(storage: Storage, study_name: str, trial: int | None = None) -> Chosen:
    """The trial of this number, or else the winner of the confirmation.

    Raises `StudyError` if there is neither.
    """
    opened = storage.open()
    study = studies.load(opened, study_name)
    ranking = confirm.ranking(opened, study_name)
    if trial is None:
        if not ranking or ranking[0].given_up:
            raise StudyError(
                f"no candidate of study {study_name!r} is confirmed: run `nas-mnist confirm`, or name a trial", "trial"
            )
        trial = ranking[0].trial
    confirmed = next((c for c in ranking if c.trial == trial), None)
    frozen = studies.find_trial(study, trial)
    return Chosen(
        TrialRecord.from_trial(frozen).candidate,
        trial,
        frozen.value if frozen.state == TrialState.COMPLETE else None,
        confirmed.to_dict() if confirmed else None,
    )


def retrain(settings: RetrainSettings, workers: list[Worker], on_event: OnWorkerEvent) -> Retrained:
    """Train the missing seeds and return what all of them have come to.

    Raises `BudgetError` for a network over the budget of the task, `StudyError` for another dataset than that of the
    search, before anything is trained.
    """
    n_parameters = count_parameters(settings.chosen.candidate.architecture)
    if n_parameters >= MAX_PARAMS:
        raise BudgetError(
            f"architecture has {n_parameters:,} parameters; the limit is {MAX_PARAMS - 1:,}: reduce a width or a block"
        )
    studies.dataset_of(settings.storage, settings.study_name, settings.dataset)
    prepare(settings.data_dir, settings.dataset)
    full_split(settings)
    run_planned(settings.queue, partial(_prepare, settings), workers, on_event)
    return load(settings.storage, settings.study_name, settings.chosen)


def load(storage: Storage, study_name: str, chosen: Chosen | None = None) -> Retrained:
    """The retraining of this candidate that is in the storage, by default that of the last one retrained.

    Raises `StudyError` if it was never retrained.
    """
    opened = storage.open()
    name = f"{study_name}-retrain"
    if name not in studies.names(opened):
        raise StudyError(f"nothing of study {study_name!r} has been retrained: run `nas-mnist retrain` first")
    study = studies.load(opened, name)
    ended = runs_of(PlannedSeed, study.get_trials(deepcopy=False, states=FINISHED))
    if chosen is None and not ended:
        raise StudyError("nothing has been retrained: run `nas-mnist retrain` first")
    chosen = chosen or _last_chosen(ended)
    own = _of_candidate(chosen, ended)
    complete = [trial for _, trial in own if trial.state == TrialState.COMPLETE]
    if not complete:
        raise _nothing_retrained(chosen, own)
    return _retrained(study, chosen, own, _read_weights(storage, study, complete[0]))


def results(opened: RDBStorage, study_name: str) -> list[Retrained]:
    """Every candidate that was retrained, the last one first, without weights; those that always diverged left out."""
    name = f"{study_name}-retrain"
    if name not in studies.names(opened):
        return []
    study = studies.load(opened, name)
    left, all_results = runs_of(PlannedSeed, study.get_trials(deepcopy=False, states=FINISHED)), []
    while left:
        chosen = _last_chosen(left)
        own = _of_candidate(chosen, left)
        if any(trial.state == TrialState.COMPLETE for _, trial in own):
            all_results.append(_retrained(study, chosen, own, {}))
        left = [(run, trial) for run, trial in left if run.candidate != chosen.candidate]
    return all_results


def _of_candidate(chosen: Chosen, ended: Ended) -> Ended:
    """Those of one candidate, by seed."""
    return sorted((pair for pair in ended if pair[0].candidate == chosen.candidate), key=lambda pair: pair[0].seed)


def _retrained(study: optuna.Study, chosen: Chosen, own: Ended, weights: dict[str, Tensor]) -> Retrained:
    return Retrained(
        chosen.candidate,
        chosen.trial,
        chosen.search_score,
        chosen.confirmation,
        tuple(_run(run.seed, trial) for run, trial in own if trial.state == TrialState.COMPLETE),
        weights,
        tuple(run.seed for run, trial in own if trial.state != TrialState.COMPLETE),
        studies.recorded_identity(study)["train_images"],
        studies.recorded_dataset(studies.recorded_identity(study)),
    )


def _nothing_retrained(chosen: Chosen, diverged: Ended) -> StudyError:
    if diverged:
        return StudyError(f"{chosen.name} diverged with every seed ({len(diverged)}): retrain another", "trial")
    return StudyError(f"{chosen.name} has not been retrained: run `nas-mnist retrain` first")


def _last_chosen(ended: Ended) -> Chosen:
    run, last = max(ended, key=lambda pair: pair[1].number)  # not by its time: the clock may have been set
    return Chosen(run.candidate, **TrialRecord.from_trial(last).chosen or {})


def _run(seed: int, trial: FrozenTrial) -> Run:
    record = TrialRecord.from_trial(trial)
    return Run(seed, record.epochs, record.seconds, written(record.device), written(record.versions))


def _prepare(settings: RetrainSettings, device_name: str) -> Objective[PlannedSeed]:
    device = torch.device(device_name)
    return partial(_train, settings, full_split(settings, device), device)


def _train(
    settings: RetrainSettings,
    split: Split,
    device: torch.device,
    trial: optuna.Trial,
    run: PlannedSeed,
    on_event: OnEvent,
) -> float:
    """One seed, from its plan to the test accuracy of its last epoch; the weights are kept with the trial."""
    candidate, seed = run.candidate, run.seed
    record(trial, candidate, count_parameters(candidate.architecture), seed, device)
    chosen = settings.chosen
    if chosen.candidate == candidate:  # it may be a run of another one that was stopped, with a history of its own
        history = {"trial": chosen.trial, "search_score": chosen.search_score, "confirmation": chosen.confirmation}
        write_chosen(trial, history)
    on_event(RunStarted(trial.number, f"seed {seed}"))
    network = build(candidate.architecture, seed=seed, device=device)
    epochs = train_and_report(trial, network, candidate.recipe, split, seed, on_event)
    Artifacts(trial.study, settings.storage.artifacts).add_weights(trial, network)
    return epochs[-1].eval_accuracy


def _read_weights(storage: Storage, study: optuna.Study, trial: FrozenTrial) -> dict[str, Tensor]:
    weights = Artifacts(study, storage.artifacts).weights_of(trial)
    if weights is None:
        raise StudyError(f"trial {trial.number} has no weights: run `nas-mnist retrain` again")
    return weights
