"""What a trial says of itself: the names of its attributes, and the one place that reads what earlier versions wrote.

Optuna keeps the attributes of a trial as JSON under names, which the dashboard shows; here they are written, and read
into types. A recipe is read by `stored`, whichever version wrote it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self, TypeVar

import optuna
from optuna.trial import FrozenTrial, TrialState

from nas_mnist.errors import StudyError
from nas_mnist.model.architecture import parse
from nas_mnist.study import stored
from nas_mnist.study.ownership import OWNER
from nas_mnist.study.space import Candidate
from nas_mnist.training.loop import EpochResult
from nas_mnist.training.recipe import Recipe

CONSTRAINT = "parameters"  # parameters − (limit − 1); feasible when ≤ 0
PLANNED_RUN = "job"  # attribute of a trial, written when it is queued, before any parameter is drawn
T = TypeVar("T")


@dataclass(frozen=True)
class PlannedRun:
    """A run that is known beforehand: a stage's own has what tells it from the others; equal ones are the same run."""

    def attributes(self) -> dict[str, Any]:
        """The user attributes of a trial that stands for this run; `of` is the way back."""
        values = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return {
            PLANNED_RUN: {
                name: value.to_dict() if isinstance(value, Candidate) else value for name, value in values.items()
            }
        }

    @classmethod
    def of(cls, trial: FrozenTrial | optuna.Trial) -> Self:
        """The run that a trial of the stage's study stands for, whichever version queued it."""
        return cls(**planned_values(trial))


def planned_values(trial: FrozenTrial | optuna.Trial) -> dict[str, Any]:
    """What tells the run that a trial stands for, of whatever stage, from others; empty if it draws what it does."""
    values: dict[str, Any] = trial.user_attrs.get(PLANNED_RUN) or {}
    if "candidate" in values:
        return values | {"candidate": Candidate.from_dict(values["candidate"])}
    return values


def written(value: T | None) -> T:
    """What is written of every trial that was trained. Raises `StudyError` where it is missing."""
    if value is None:
        raise StudyError("a trial of this study lacks what every finished one has: the database is damaged")
    return value


@dataclass(frozen=True)
class TrialRecord:
    """What is written of a trial; None, or empty, where it did not come to that. Accuracies are fractions."""

    number: int
    architecture: str | None = None  # in notation; where it is, all of the next seven are
    n_parameters: int | None = None
    n_macs: int | None = None
    receptive_field: int | None = None
    seed: int | None = None
    device: str | None = None
    versions: str | None = None
    recipe_values: dict[str, Any] | None = None  # in the form of the version that wrote it
    seconds: float = 0.0  # of training and validation
    short_run: tuple[EpochResult, ...] = ()  # the training of few epochs before that of all
    epochs: tuple[EpochResult, ...] = ()
    reason: str | None = None  # why it diverged
    reference: str | None = None  # the warm start that it is, by name
    origin: str = ""  # where its parameters come from; empty for a draw of an earlier version, which did not say
    parent: int | None = None  # the number of the trial that it is a mutation of
    process: str = "unknown"  # that ran it
    excess: dict[str, int] = field(default_factory=dict)  # by part of the budget that it is over
    accuracies: tuple[float, ...] = ()  # of a confirmation, one for each pair of fold and seed
    folds: int | None = None
    seeds: int | None = None
    chosen: dict[str, Any] | None = None  # of a retraining: how its candidate was found
    system: str | None = None  # of a baseline

    @classmethod
    def from_trial(cls, trial: FrozenTrial | optuna.Trial) -> "TrialRecord":
        """Whichever version of nas-mnist wrote it."""
        values = trial.user_attrs
        plain = {f.name: values[f.name] for f in fields(cls) if f.name in values}
        return cls(
            **plain
            | {
                "number": trial.number,
                "recipe_values": values.get("recipe"),
                "short_run": short_run_of(trial),
                "epochs": epochs_of(trial),
                "origin": values.get("origin", values.get("reference", "")),
                "process": str(values.get(OWNER, "unknown")),
                "excess": {name: round(value) for name, value in trial.constraints.items() if value > 0},
                "accuracies": tuple(values.get("accuracies", ())),
            }
        )

    @property
    def recipe(self) -> Recipe:
        return stored.read(written(self.recipe_values))

    @property
    def candidate(self) -> Candidate:
        return Candidate(parse(written(self.architecture)), self.recipe)


def epochs_of(trial: FrozenTrial | optuna.Trial) -> tuple[EpochResult, ...]:
    """The result of each epoch so far, the short run apart."""
    return tuple(epoch_from(values) for values in trial.user_attrs.get("epochs", ()))


def short_run_of(trial: FrozenTrial | optuna.Trial) -> tuple[EpochResult, ...]:
    """The epochs of a short run that were judged."""
    return tuple(epoch_from(values) for values in trial.user_attrs.get("short_run", ()))


def n_epochs(trial: FrozenTrial) -> int:
    """Epochs that were trained for this trial, those of its short run counted in."""
    short_run = short_run_of(trial)
    return (short_run[-1].number if short_run else 0) + sum(step > 0 for step in trial.intermediate_values)


def how_far(trial: FrozenTrial) -> str:
    """Where a trial was stopped, as people read it."""
    n = max(trial.intermediate_values, default=None)
    if n is None:
        return "in its short run" if short_run_of(trial) else "in its first epochs"
    return f"after epoch {n}" if n else "after its short run"


def epoch_from(values: Mapping[str, Any]) -> EpochResult:
    """Whichever version wrote it: once there was `val_loss` where there is `eval_loss`, the test set's or not."""
    names = {name: f"e{name}" if name.startswith("val_") else name for name in values}
    return EpochResult(**{names[name]: value for name, value in values.items()})


def write_candidate(
    trial: optuna.Trial, candidate: Candidate, n_parameters: int, seed: int | None, device: str, versions: str
) -> None:
    """Write down what is going to be trained, flat, so that the dashboard can sort by it."""
    _write(
        trial,
        n_parameters=n_parameters,
        n_macs=candidate.architecture.n_macs,
        receptive_field=candidate.architecture.receptive_field,
        recipe=stored.write(candidate.recipe),
        seed=seed,
        device=device,
        versions=versions,
        architecture=str(candidate.architecture),  # the last: where it is, all are
    )


def write_excess(trial: optuna.Trial, n_parameters: int, max_params: int, others: Mapping[str, int]) -> None:
    """By how much it is over each part of the budget, as constraints; a retried trial brings them along."""
    if CONSTRAINT not in trial.constraints:
        for name, excess in {**others, CONSTRAINT: n_parameters - (max_params - 1)}.items():  # the last says: all are
            trial.set_constraint(name, excess)


RESULTS = ("short_run", "epochs", "seconds", "reason")  # attributes of a training; one that begins anew has none


def write_short_run(trial: optuna.Trial, judged: Sequence[EpochResult]) -> None:
    _write(trial, short_run=[asdict(epoch) for epoch in judged], seconds=_seconds(judged))


def write_epochs(trial: optuna.Trial, epochs: Sequence[EpochResult]) -> None:
    seconds = _seconds([*short_run_of(trial), *epochs])
    _write(trial, epochs=[asdict(epoch) for epoch in epochs], seconds=seconds)


def _seconds(epochs: Sequence[EpochResult]) -> float:
    return sum(epoch.train_seconds + epoch.eval_seconds for epoch in epochs)


def write_origin(trial: optuna.Trial, origin: str) -> None:
    _write(trial, **origin_attributes(origin))


def write_reason(trial: optuna.Trial, reason: str) -> None:
    _write(trial, reason=reason)


def write_pairs(trial: optuna.Trial, folds: int, seeds: int) -> None:
    """What a candidate is confirmed on."""
    _write(trial, folds=folds, seeds=seeds)


def write_change(trial: optuna.Trial, change: str) -> None:
    """What an ablation's run has other than the network it is of."""
    _write(trial, change=change)


def write_accuracies(trial: optuna.Trial, accuracies: Iterable[float]) -> None:
    _write(trial, accuracies=list(accuracies))


def write_chosen(trial: optuna.Trial, history: dict[str, Any]) -> None:
    _write(trial, chosen=history)


def write_system(trial: optuna.Trial, name: str, published_accuracy: float | None) -> None:
    """Which reference system it is, and what was published of it on this dataset."""
    _write(trial, system=name)
    if published_accuracy is not None:
        _write(trial, published_accuracy=published_accuracy)


def _write(trial: optuna.Trial, **attributes: Any) -> None:
    for name, value in attributes.items():
        trial.set_user_attr(name, value)


def warm_start_attributes(name: str) -> dict[str, Any]:
    """The user attributes of a trial that is queued with a warm start's parameters."""
    return {"reference": name, **origin_attributes(name)}


def origin_attributes(origin: str, parent: int | None = None) -> dict[str, Any]:
    """The user attributes that say where a trial's parameters come from, and the number of the trial they are like."""
    return {"origin": origin} | ({} if parent is None else {"parent": parent})


@dataclass(frozen=True)
class TrialCounts:
    """How many trials of a study are in which state. Trained means: one epoch at least, ended by itself or pruned."""

    trained: int
    pruned: int  # of the trained
    running: int
    waiting: int
    over_budget: int
    failed: int

    @classmethod
    def of(cls, trials: Sequence[FrozenTrial]) -> "TrialCounts":
        counts = {state: sum(trial.state == state for trial in trials) for state in TrialState}
        trained = [trial for trial in trials if is_trained(trial)]
        return cls(
            trained=len(trained),
            pruned=sum(trial.state == TrialState.PRUNED for trial in trained),
            running=counts[TrialState.RUNNING],
            waiting=counts[TrialState.WAITING],
            over_budget=sum(trial.state == TrialState.PRUNED and is_over_budget(trial) for trial in trials),
            failed=counts[TrialState.FAIL],
        )


def is_over_budget(trial: FrozenTrial) -> bool:
    return any(value > 0 for value in trial.constraints.values())


def is_trained(trial: FrozenTrial) -> bool:
    return trial.state in (TrialState.COMPLETE, TrialState.PRUNED) and not is_over_budget(trial)


def leaderboard(trials: Iterable[FrozenTrial]) -> tuple[FrozenTrial, ...]:
    """The trials that ran to their end, best first; pruned ones have no final accuracy."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE and not is_over_budget(trial)]
    return tuple(sorted(complete, key=lambda trial: -written(trial.value)))


def ancestors(trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trial and those that it descends from, the first of them first."""
    line = [trial]
    while (parent := TrialRecord.from_trial(line[-1]).parent) is not None:
        line.append(trials[parent])
    return line[::-1]
