"""Studies that nobody trained, for tests of what is made of a study."""

import math
from dataclasses import asdict
from datetime import datetime, timedelta

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from nas_mnist.stages import ablate
from nas_mnist.stages.ablate import Ablated, Difference, Outcome
from nas_mnist.stages.confirm import Confirmed
from nas_mnist.stages.retrain import Retrained, Run
from nas_mnist.stages.search import SearchSettings
from nas_mnist.study import space, stored, studies
from nas_mnist.study.records import CONSTRAINT
from nas_mnist.study.storage import Storage
from nas_mnist.training.loop import EpochResult

START = datetime(2026, 1, 5, 8, 0)
MINUTE = timedelta(minutes=1)


def new_study(trials=(), name="nas-mnist", path=None, **settings) -> optuna.Study:
    """A search's study with these trials, in memory or in the SQLite file `path`, which takes its time."""
    identity = asdict(SearchSettings(Storage(""), name, **settings).identity)
    storage = Storage.parse(str(path)).open(create=True) if path else optuna.storages.InMemoryStorage()
    studies.create(storage, name, metric="validation accuracy", attributes={"identity": identity})
    study = studies.load(storage, name)
    study.add_trials(trials)
    return study


def draw_trials(n: int) -> list[FrozenTrial]:
    """As a long search leaves them: some pruned, some over the budget, one diverged, one failed, two running."""
    outcomes = ["pruned" if i % 5 in (2, 4) else "over budget" if i % 17 == 3 else "finished" for i in range(n)]
    outcomes[-4:] = ["diverged", "failed", "running", "running"]
    errors = 0.006 + 0.02 * np.random.default_rng(0).beta(1, 4, n)
    return [
        draw_trial(i, outcome, error=error) for i, (outcome, error) in enumerate(zip(outcomes, errors, strict=True))
    ]


def draw_trial(number: int, outcome: str = "finished", *, error: float = 0.008, max_params: int = 8000) -> FrozenTrial:
    """A trial as the search would have left it; its learning curve ends near an error of `error`."""
    rng = np.random.default_rng(number)
    parameters = {name: _draw(rng, distribution) for name, distribution in space.distributions().items()}
    candidate = space.to_candidate(parameters, max_params=max_params, epochs=15)
    n_epochs = {"finished": 15, "pruned": int(rng.integers(5, 12)), "diverged": 2, "running": 3}.get(outcome, 0)
    curve = 1 - (error + 0.9 * np.exp(-np.arange(1, n_epochs + 1) / 1.5)) * rng.uniform(0.9, 1.1, n_epochs)
    n_parameters = candidate.architecture.n_parameters + max_params * (outcome == "over budget")
    states = {"finished": TrialState.COMPLETE, "failed": TrialState.FAIL, "running": TrialState.RUNNING}
    trial = create_trial(
        state=states.get(outcome, TrialState.PRUNED),
        value=float(curve[-2:].mean()) if outcome == "finished" else None,
        params=parameters,
        distributions=space.distributions(),
        intermediate_values={epoch: float(value) for epoch, value in enumerate(curve, 1)},
        user_attrs={
            "architecture": str(candidate.architecture),
            "n_parameters": n_parameters,
            "n_macs": candidate.architecture.n_macs,
            "receptive_field": candidate.architecture.receptive_field,
            "recipe": stored.write(candidate.recipe),
            "seed": number,
            "device": "a processor",
            "versions": "Python 3.12.1, nas-mnist 0.1.0, torch 2.15.0, optuna 5.0.0",
            "seconds": 4.5 * n_epochs,
            "worker": ["host", 100 + number % 4, 1.0],
            **({"reason": "the training loss was nan"} if outcome == "diverged" else {}),
        },
        constraints={CONSTRAINT: float(n_parameters - (max_params - 1))},
    )
    trial.datetime_start = START + number // 4 * MINUTE
    if trial.state.is_finished():
        trial.datetime_complete = trial.datetime_start + n_epochs / 16 * MINUTE
    return trial


def _draw(rng: np.random.Generator, distribution: BaseDistribution):
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[rng.integers(len(distribution.choices))]
    if isinstance(distribution, IntDistribution):
        return int(rng.integers(distribution.low, distribution.high + 1))
    if distribution.log:
        return float(np.exp(rng.uniform(np.log(distribution.low), np.log(distribution.high))))
    return float(rng.uniform(distribution.low, distribution.high))


def confirm_trial(trial: FrozenTrial, *, given_up: bool = False) -> Confirmed:
    """What a confirmation on four folds might have made of a finished trial."""
    accuracies = tuple(trial.value - 0.0005 - 0.0001 * k for k in range(4))
    attributes = trial.user_attrs
    return Confirmed(
        trial.number,
        attributes["architecture"],
        attributes["n_parameters"],
        trial.value,
        accuracies,
        folds=4,
        seeds=1,
        given_up=given_up,
    )


def ablate_trial(trial: FrozenTrial) -> tuple[Ablated, ...]:
    """What an ablation of a finished trial on four folds might have come to; the last row diverged in part."""
    rows = ablate.changes(space.Candidate.from_dict(trial.user_attrs))
    base = tuple(Outcome(0.02, trial.value - 0.0001 * k) for k in range(4))
    return (
        Ablated(rows[0], base, 0, None),
        Ablated(rows[1], base, 0, Difference(4, -0.0021, 0.0004, 0.006, 0.001, 0.012)),
        Ablated(rows[2], base[:1], 3, Difference(1, 0.0003, math.nan, -0.001, math.nan, math.nan)),
    )


def retrain_trial(trial: FrozenTrial) -> Retrained:
    """What retraining a finished trial with three seeds might have come to."""
    candidate = space.Candidate.from_dict(trial.user_attrs)
    runs = tuple(
        Run(seed, tuple(_epoch(e, 0.99 + 0.0003 * e + 0.0002 * seed) for e in range(1, 16)), 60.0, "CPU", "torch")
        for seed in range(3)
    )
    return Retrained(candidate, trial.number, trial.value, None, runs, {})


def _epoch(number: int, accuracy: float) -> EpochResult:
    return EpochResult(number, 0.1, 0.98, 0.03, accuracy, learning_rate=0.1, train_seconds=3.5, eval_seconds=0.5)
