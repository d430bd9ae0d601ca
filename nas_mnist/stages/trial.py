"""One trial: record what is trained, train it, and report every epoch to the study and to who watches."""

import platform
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

import optuna
import torch
from optuna.trial import FrozenTrial

from nas_mnist.data.folds import Split
from nas_mnist.errors import TrainingDiverged
from nas_mnist.model.network import Network
from nas_mnist.study import shared as study
from nas_mnist.study import stored
from nas_mnist.study.pruner import EPOCHS
from nas_mnist.study.space import Candidate
from nas_mnist.training.loop import EpochResult, train
from nas_mnist.training.recipe import Recipe
from nas_mnist.workers.events import Completed, Progress, Send


@dataclass(frozen=True)
class TrialStarted:
    """A worker began to train a candidate."""

    trial: int
    architecture: str
    n_parameters: int


@dataclass(frozen=True)
class EpochTrained(Progress):
    trial: int
    epoch: EpochResult


@dataclass(frozen=True)
class TrialEnded(Completed):
    """A trial is over and stored: trained to the end, pruned, or over the budget."""

    trial: int
    over_budget: bool
    n_epochs: int
    accuracy: float | None  # the objective; None if it was pruned


@dataclass(frozen=True)
class WorkerDone:
    """Where a worker's time went: in training and validation, and altogether, start-up and waiting at the end apart."""

    training_seconds: float
    total_seconds: float


def record(
    trial: optuna.Trial, candidate: Candidate, n_parameters: int, seed: int | None, device: torch.device
) -> None:
    """Write down what is going to be trained, flat, so that the dashboard can sort by it."""
    attributes = {
        "n_parameters": n_parameters,
        "n_macs": candidate.architecture.n_macs,
        "receptive_field": candidate.architecture.receptive_field,
        "recipe": stored.write(candidate.recipe),
        "seed": seed,
        "device": device_name(device),
        "versions": versions(),
        "architecture": str(candidate.architecture),  # the last: where it is, all are
    }
    for name, value in attributes.items():
        trial.set_user_attr(name, value)


def train_and_report(
    trial: optuna.Trial,
    network: Network,
    recipe: Recipe,
    split: Split,
    seed: int,
    send: Send,
    averaged_epochs: Collection[int] = (),
) -> list[EpochResult]:
    """Train to the last epoch, or until the study's pruner has seen enough; every epoch is stored as it ends.

    Raises `optuna.TrialPruned`, also if the loss is not finite; then the attribute `reason` says so.
    """
    epochs: list[EpochResult] = []
    try:
        for epoch in train(network, recipe, split.train, split.val, seed=seed, averaged_epochs=averaged_epochs):
            epochs.append(epoch)
            trial.set_user_attr(EPOCHS, [asdict(e) for e in epochs])
            trial.set_user_attr("seconds", sum(e.train_seconds + e.val_seconds for e in epochs))
            trial.report(epoch.val_accuracy, epoch.number)
            send(EpochTrained(trial.number, epoch))
            if epoch.number < recipe.epochs and trial.should_prune():
                raise optuna.TrialPruned("cannot win any more")
    except TrainingDiverged as error:
        trial.set_user_attr("reason", str(error))
        raise optuna.TrialPruned(str(error)) from None
    return epochs


def work_off(shared: study.SharedStudy, objective: Callable[[optuna.Trial, Send], float], send: Send) -> None:
    """Run the objective in this worker until the study has nothing left to hand out, and tell how it goes."""
    training_seconds = 0.0

    def note(event) -> None:
        nonlocal training_seconds
        if isinstance(event, EpochTrained):
            training_seconds += event.epoch.train_seconds + event.epoch.val_seconds
        send(event)

    start = time.perf_counter()
    study.work_off(shared, lambda trial: objective(trial, note), lambda _, trial: send(_ended(trial)))
    send(WorkerDone(training_seconds, time.perf_counter() - start - shared.waited_seconds))


def _ended(trial: FrozenTrial) -> TrialEnded:
    """Optuna gives a pruned trial its last report as its value, which is no objective."""
    complete = trial.state == optuna.trial.TrialState.COMPLETE
    n_epochs = len(trial.intermediate_values)
    return TrialEnded(trial.number, study.is_over_budget(trial), n_epochs, trial.value if complete else None)


@cache
def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@cache
def versions() -> str:
    packages = ("nas-mnist", "torch", "optuna")
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)])
