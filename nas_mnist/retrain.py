"""The chosen candidate, trained on all 60,000 images with several seeds; only here does it meet the test set.

The test set is evaluated after every epoch for the record. What counts is the last epoch, never the best one, and the
weights that are exported are those of the first seed, not of the best.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import optuna
import safetensors.torch
import torch
from optuna.trial import FrozenTrial, TrialState
from torch import Tensor

from nas_mnist import study
from nas_mnist.data import DATASET, N_TRAIN_IMAGES, Split, load_test, load_train, prepare, search_split
from nas_mnist.errors import BudgetError, StudyError
from nas_mnist.network import build, count_parameters
from nas_mnist.space import Candidate
from nas_mnist.task import MAX_EPOCHS, MAX_PARAMS, N_FINAL_EPOCHS, TARGET_ACCURACY
from nas_mnist.training import EpochResult
from nas_mnist.trial import TrialStarted, record, train_and_report, work_off
from nas_mnist.workers import Send, Worker, run_workers


@dataclass(frozen=True)
class Run:
    """One seed. In its epochs `val_loss` and `val_accuracy` are of the test set."""

    seed: int
    epochs: tuple[EpochResult, ...]
    seconds: float
    device: str
    versions: str

    @property
    def accuracy(self) -> float:
        """Test accuracy of the last epoch, as a fraction."""
        return self.epochs[-1].val_accuracy

    @property
    def worst_of_last(self) -> float:
        """The worse of the last two epochs."""
        return min(epoch.val_accuracy for epoch in self.epochs[-N_FINAL_EPOCHS:])


@dataclass(frozen=True)
class Verdict:
    """Whether the task is fulfilled, and by how much."""

    n_parameters: int
    n_epochs: int
    worst_of_last: float  # over all seeds

    @property
    def few_parameters(self) -> bool:
        return self.n_parameters < MAX_PARAMS

    @property
    def few_epochs(self) -> bool:
        return self.n_epochs <= MAX_EPOCHS

    @property
    def accurate(self) -> bool:
        return self.worst_of_last >= TARGET_ACCURACY

    def __bool__(self) -> bool:
        return self.few_parameters and self.few_epochs and self.accurate


@dataclass(frozen=True)
class Retrained:
    """A candidate and all its runs on the 60,000 training images."""

    candidate: Candidate
    trial: int | None  # of the search; None for an architecture that was named
    search_score: float | None
    confirmation: dict[str, Any] | None
    runs: tuple[Run, ...]  # by seed
    weights: dict[str, Tensor]  # of the first seed

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
        )
