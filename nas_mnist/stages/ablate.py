"""Why is a network good? One change at a time, each trained beside it on the same folds and from the same seeds.

A pair is a fold and a seed; of every change the differences to the network as it is are taken pair by pair, so that
what the fold and the seed do to both falls out. A *ladder* is the same the other way round: the steps by which people
came to their network, each compared with the one before.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import nan, sqrt
from statistics import mean, stdev
from typing import Any, get_args

import optuna
import torch
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from scipy.stats import ttest_rel

from nas_mnist.data.folds import CONFIRM_PARTITION
from nas_mnist.data.images import Images, load_train
from nas_mnist.data.unpacking import prepare
from nas_mnist.errors import ArchitectureError
from nas_mnist.model.architecture import ACTIVATION_NAMES, Activation, Architecture
from nas_mnist.model.ladders import LADDERS, Rung
from nas_mnist.model.network import build, count_parameters
from nas_mnist.model.variations import variations, without_norms
from nas_mnist.stages.baselines import RECIPE
from nas_mnist.stages.confirm import SIGNIFICANT_P, ConfirmSettings, check_train_images
from nas_mnist.stages.planned import Objective, Queue, RunStarted, run_planned, runs_of
from nas_mnist.stages.trial import record, train_and_report
from nas_mnist.study import studies
from nas_mnist.study.records import PlannedRun, TrialRecord, write_change, written
from nas_mnist.study.space import Candidate, reference_recipe
from nas_mnist.training.augmentation import Augmentation
from nas_mnist.training.evaluation import final_accuracy
from nas_mnist.training.recipe import Optimizer, Recipe
from nas_mnist.workers.events import OnEvent, OnWorkerEvent, Worker

AS_IT_IS = "as it is"
NO_AUGMENTATION = Augmentation(0.0, 0.0, 0.0, 0.0)
DROPOUT = 0.05  # what is tried where there is none
CONSTANT_SHARE = 0.3  # of the maximum: at the maximum itself a constant rate ends in noise


@dataclass(frozen=True)
class Change:
    """A row of the table: what is trained, and what was published of it, if it is a rung of a ladder."""

    name: str
    candidate: Candidate
    published: float | None = None  # accuracy, a fraction

    @property
    def n_parameters(self) -> int:
        return count_parameters(self.candidate.architecture)


def changes(candidate: Candidate) -> tuple[Change, ...]:
    """The network as it is, then one change at a time: of training, of what follows layers, of structure."""
    architecture, recipe = candidate.architecture, candidate.recipe
    rows = [Change(AS_IT_IS, candidate)]
    rows += [
        Change(name, Candidate(architecture, changed)) for name, changed in _recipes(recipe, architecture.n_parameters)
    ]
    rows += [Change(name, Candidate(changed, recipe)) for name, changed in _architectures(architecture)]
    return tuple(rows)


def _recipes(recipe: Recipe, size: int) -> Iterator[tuple[str, Recipe]]:
    if recipe.augmentation:
        yield "no augmentation", replace(recipe, augmentation=NO_AUGMENTATION)
    if recipe.schedule != "constant":
        rate = CONSTANT_SHARE * recipe.learning_rate
        yield f"constant rate of {rate:.2g}", replace(recipe, schedule="constant", learning_rate=rate)
    for optimizer in get_args(Optimizer):
        if optimizer != recipe.optimizer:
            rate, decay = (other := reference_recipe(optimizer, size=size)).learning_rate, other.weight_decay
            changed = replace(recipe, optimizer=optimizer, learning_rate=rate, weight_decay=decay)
            yield f"{optimizer} instead of {recipe.optimizer}", changed
    recalibrated = "norms not recalibrated" if recipe.recalibrated else "norms recalibrated"
    yield recalibrated, replace(recipe, recalibrated=not recipe.recalibrated)


def _architectures(architecture: Architecture) -> Iterator[tuple[str, Architecture]]:
    if architecture.dropout:
        yield "no dropout", replace(architecture, dropout=0.0)
    else:
        yield f"dropout of {DROPOUT:g}", replace(architecture, dropout=DROPOUT)
    if architecture.norm_first:  # behind a norm there can be any activation, before it a ReLU
        for activation in get_args(Activation):
            if activation != architecture.activation:
                names = ACTIVATION_NAMES[activation], ACTIVATION_NAMES[architecture.activation]
                yield " instead of ".join(names), replace(architecture, activation=activation)
    deskewed = "not deskewed" if architecture.deskewed else "deskewed"
    yield deskewed, replace(architecture, deskewed=not architecture.deskewed)
    if (bare := without_norms(architecture)) != architecture:
        yield "no norms, biases instead", bare
        if architecture.activation == "relu":
            order = "ReLU before norm" if architecture.norm_first else "norm before ReLU"
            yield order, replace(architecture, norm_first=not architecture.norm_first)
    yield from variations(architecture)


def ladder(name: str, epochs: int) -> tuple[Change, ...]:
    """The published steps of a network, trained as the baselines are. Raises `ArchitectureError` if there are none."""
    if name not in LADDERS:
        raise ArchitectureError(f"nobody has published the steps to {name!r}: choose one of {', '.join(LADDERS)}")
    return tuple(Change(rung.name, _candidate_of(rung, epochs), rung.published) for rung in LADDERS[name])


def _candidate_of(rung: Rung, epochs: int) -> Candidate:
    recipe = replace(RECIPE, epochs=epochs)
    if not rung.augmented:
        recipe = replace(recipe, augmentation=NO_AUGMENTATION)
    if not rung.one_cycle:
        recipe = replace(recipe, schedule="constant", learning_rate=CONSTANT_SHARE * RECIPE.learning_rate)
    return Candidate(rung.architecture, recipe)


@dataclass(frozen=True)
class PlannedChange(PlannedRun):
    """A row on one pair."""

    candidate: Candidate
    seed: int
    fold: int  # that is held out, counted from 0


@dataclass(frozen=True, kw_only=True)
class AblateSettings(ConfirmSettings):
    """What is compared, and on how many pairs; kept in `<study>-ablate`. Of a ladder each row with the one before."""

    rows: tuple[Change, ...]
    climbing: bool = False  # a ladder

    @property
    def queue(self) -> Queue[PlannedChange]:
        """The first pair of every row before the second of any: comparable however early it is stopped."""
        runs = tuple(PlannedChange(row.candidate, seed, fold) for fold, seed in self.pairs for row in self.rows)
        identity = {
            "dataset": self.dataset.name,
            "folds": self.n_folds,
            "train_images": self.train_images,
            "partition": CONFIRM_PARTITION,
        }
        n_epochs = max(row.candidate.recipe.epochs for row in self.rows)
        name = ablation_name(self.study_name)
        return Queue(self.storage, name, "validation accuracy", identity, PlannedChange, runs, n_epochs)


def ablation_name(study_name: str) -> str:
    return f"{study_name}-ablate"


@dataclass(frozen=True)
class Outcome:
    """What one run came to: cross-entropy of its last epoch in nats, accuracy of its last two as a fraction."""

    loss: float
    accuracy: float


@dataclass(frozen=True)
class Difference:
    """A row less what it is compared with, over the pairs that both have: means, standard errors, paired t-test."""

    n: int
    accuracy: float
    accuracy_error: float  # NaN for fewer than two pairs, as is p
    loss: float
    loss_error: float
    p: float  # of the accuracies, two-sided

    @property
    def significant(self) -> bool:
        return self.p < SIGNIFICANT_P


@dataclass(frozen=True)
class Ablated:
    """A row and what came of it. Accuracies are fractions; what others are compared with has no difference."""

    change: Change
    outcomes: tuple[Outcome, ...]
    n_diverged: int
    difference: Difference | None

    @property
    def accuracy(self) -> float | None:
        return mean(o.accuracy for o in self.outcomes) if self.outcomes else None

    @property
    def standard_deviation(self) -> float | None:
        """Between pairs; None for fewer than two."""
        return stdev(o.accuracy for o in self.outcomes) if len(self.outcomes) > 1 else None

    @property
    def loss(self) -> float | None:
        return mean(o.loss for o in self.outcomes) if self.outcomes else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; accuracies as fractions, losses in nats."""
        return {
            "change": self.change.name,
            "architecture": str(self.change.candidate.architecture),
            "n_parameters": self.change.n_parameters,
            "published": self.change.published,
            "n": len(self.outcomes),
            "n_diverged": self.n_diverged,
            "accuracy": self.accuracy,
            "standard_deviation": self.standard_deviation,
            "loss": self.loss,
            "difference": None if self.difference is None else _without_nan(asdict(self.difference)),
        }


def _without_nan(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has no NaN."""
    return {name: None if value != value else value for name, value in values.items()}


def ablate(settings: AblateSettings, workers: list[Worker], on_event: OnWorkerEvent) -> tuple[Ablated, ...]:
    """Train every row on every pair that is missing, and compare.

    Raises `KeyboardInterrupt` when stopped, finished runs kept; `StudyError` if the study is of other folds,
    `DataError` for more images than a fold has.
    """
    check_train_images(settings)
    prepare(settings.data_dir, settings.dataset)
    trials = run_planned(settings.queue, partial(_prepare, settings), workers, on_event)
    return compare(settings.rows, trials, climbing=settings.climbing)


def compare(rows: Iterable[Change], trials: Iterable[FrozenTrial], *, climbing: bool = False) -> tuple[Ablated, ...]:
    """Each row less the first one, or, `climbing`, less the row before."""
    ended = runs_of(PlannedChange, trials)
    results: list[Ablated] = []
    outcomes: list[dict[tuple[int, int], Outcome]] = []
    for row in rows:
        own = [(run, trial) for run, trial in ended if run.candidate == row.candidate]
        done = {(run.fold, run.seed): _outcome(t) for run, t in own if t.state == TrialState.COMPLETE}
        n_diverged = sum(trial.state == TrialState.PRUNED for _, trial in own)
        base = outcomes[-1 if climbing else 0] if outcomes else None
        difference = None if base is None else _difference(done, base)
        outcomes.append(done)
        results.append(Ablated(row, tuple(done.values()), n_diverged, difference))
    return tuple(results)


def _difference(own: dict[tuple[int, int], Outcome], others: dict[tuple[int, int], Outcome]) -> Difference | None:
    """None if they have no pair in common."""
    pairs = [(own[pair], others[pair]) for pair in own if pair in others]
    if not pairs:
        return None
    accuracies, losses = [a.accuracy - b.accuracy for a, b in pairs], [a.loss - b.loss for a, b in pairs]
    p = (
        float(ttest_rel(*zip(*((a.accuracy, b.accuracy) for a, b in pairs), strict=True)).pvalue)
        if _varies(accuracies)
        else nan
    )
    return Difference(len(pairs), mean(accuracies), _error(accuracies), mean(losses), _error(losses), p)


def _varies(values: list[float]) -> bool:
    return len(set(values)) > 1


def _error(values: list[float]) -> float:
    """The standard error of the mean."""
    return stdev(values) / sqrt(len(values)) if len(values) > 1 else nan


def _outcome(trial: FrozenTrial) -> Outcome:
    return Outcome(TrialRecord.from_trial(trial).epochs[-1].eval_loss, written(trial.value))


def results_of(storage: RDBStorage, study_name: str, candidates: Iterable[Candidate]) -> tuple[Ablated, ...]:
    """The ablation of the first of these candidates that has one in the storage; empty if none has."""
    if ablation_name(study_name) not in studies.names(storage):
        return ()
    trials = studies.load(storage, ablation_name(study_name)).get_trials(deepcopy=False)
    known = {run.candidate for run, trial in runs_of(PlannedChange, trials) if trial.state == TrialState.COMPLETE}
    for candidate in candidates:
        if candidate in known:  # as it is, or as a change of another network
            found = compare(changes(candidate), trials)
            rows = tuple(row for row in found if row.outcomes or row.n_diverged)
            if len(rows) > 1:
                return rows
    return ()


def _prepare(settings: AblateSettings, device_name: str) -> Objective[PlannedChange]:
    device = torch.device(device_name)
    return partial(_train, settings, load_train(settings.data_dir, settings.dataset).to(device), device)


def _train(
    settings: AblateSettings,
    images: Images,
    device: torch.device,
    trial: optuna.Trial,
    run: PlannedChange,
    on_event: OnEvent,
) -> float:
    """One row on one pair: the mean validation accuracy of its last two epochs."""
    names = (row.name for row in settings.rows if row.candidate == run.candidate)
    name = next(names, str(run.candidate.architecture))  # another ablation may have left it in the queue
    architecture, recipe = run.candidate.architecture, run.candidate.recipe
    record(trial, run.candidate, count_parameters(architecture), run.seed, device)
    write_change(trial, name)
    on_event(RunStarted(trial.number, f"{name}, fold {run.fold + 1}, seed {run.seed}"))
    network = build(architecture, seed=run.seed, device=device)
    epochs = train_and_report(trial, network, recipe, settings.split(images, run.fold), run.seed, on_event)
    return final_accuracy([epoch.eval_accuracy for epoch in epochs])
