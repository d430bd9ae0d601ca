"""Whole searches of real trainings, ours and what else there is, of equal cost: what each has found.

    pip install syne-tune
    python tests/benchmarks/peers.py search [NAME …] [--seeds 5] [--workers 2]
    python tests/benchmarks/peers.py table

All search below 1,000 parameters, train and validate on 5,000 images each, draw from the same space, and may spend the
same number of epochs, those of short runs counted in; each runs in one process, a trial at a time. What a search holds
for its best is then trained on four folds that it has not seen, again on 5,000 images each.
`studies/ranking/peers.jsonl` is only ever added to: `search` goes on where it was cut.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from typing import Any

import numpy as np
import optuna
import torch
from jobs import read, run_all, work_off
from optuna.distributions import CategoricalDistribution, IntDistribution
from ranking import FOLDER
from structures import error_text

from nas_mnist.data.datasets import MNIST
from nas_mnist.data.folds import CONFIRM_PARTITION, Split, fold, search_split, spread
from nas_mnist.data.images import Images, load_train
from nas_mnist.data.unpacking import default_data_dir, prepare
from nas_mnist.errors import TrainingDiverged
from nas_mnist.model.network import build
from nas_mnist.stages.search import SearchSettings, sampler
from nas_mnist.stages.trial import objective, to_candidate
from nas_mnist.study import space
from nas_mnist.study.pruner import RungPruner
from nas_mnist.study.records import n_epochs
from nas_mnist.study.sampler import decided
from nas_mnist.study.storage import Storage, experimental
from nas_mnist.training.evaluation import final_accuracy
from nas_mnist.training.loop import train
from nas_mnist.views.tables import markdown_table

DATA = FOLDER / "peers.jsonl"
MAX_PARAMS, N_IMAGES, N_EPOCHS, N_FOLDS = 1000, 5_000, 250, 4
CPU, SAME = torch.device("cpu"), decided(MNIST)
Found = Iterator[tuple[int, float, dict[str, Any]]]  # epochs spent so far, accuracy of a finished trial, its parameters


def settings_of(seed: int, name: str) -> SearchSettings:
    unused = Storage.parse("peers.db")  # the studies here are in memory
    return SearchSettings(storage=unused, seed=seed, max_params=MAX_PARAMS, sampler=name, keep_weights=0)


# --- ways to search --------------------------------------------------------------------------------------------------


def with_rungs(name: str, seed: int, split: Split) -> Found:
    """As `nas-mnist search --sampler NAME` does, by its own objective."""
    settings = settings_of(seed, name)
    study = optuna.create_study(direction="maximize", sampler=sampler(settings, seed), pruner=RungPruner())
    while True:
        trial = study.ask()
        try:
            study.tell(trial, objective(trial, settings, split, CPU, lambda event: None))
        except optuna.TrialPruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        ended = study.trials[-1]
        value = ended.value if ended.state == optuna.trial.TrialState.COMPLETE else math.nan
        yield n_epochs(ended), value, ended.params


def plain_optuna(seed: int, split: Split) -> Found:
    """Its default sampler and its default pruner, which are TPE and the median."""
    with experimental():
        tpe = optuna.samplers.PartialFixedSampler(SAME, optuna.samplers.TPESampler(seed=seed))
    study = optuna.create_study(direction="maximize", sampler=tpe)
    while True:
        trial = study.ask()
        parameters = space.suggest(trial)
        accuracies = []
        for accuracy in accuracies_of(parameters, seed, trial.number, split):
            accuracies.append(accuracy)
            trial.report(accuracy, len(accuracies))
            if trial.should_prune():
                break
        value = outcome(accuracies)
        study.tell(trial, state=optuna.trial.TrialState.PRUNED) if math.isnan(value) else study.tell(trial, value)
        yield len(accuracies), value, parameters


def syne_tune(kind: str, seed: int, split: Split) -> Found:
    """Its schedulers, with their defaults; REA's population is a fifth of its hundred, for trials are few."""
    from syne_tune.backend.trial_status import Trial
    from syne_tune.optimizer import baselines
    from syne_tune.optimizer.scheduler import SchedulerDecision

    np.random.seed(seed)
    common = {"metric": "accuracy", "do_minimize": False, "random_seed": seed}
    if kind == "REA":
        scheduler = baselines.REA(syne_tunes_space(), population_size=20, sample_size=5, **common)
    else:
        scheduler = getattr(baselines, kind)(syne_tunes_space(), time_attr="epoch", max_t=15, **common)
    number = 0
    while True:
        trial = Trial(number, scheduler.suggest().config, datetime.now())
        scheduler.on_trial_add(trial)
        parameters = {**trial.config, **SAME}
        accuracies = []
        for accuracy in accuracies_of(parameters, seed, number, split):
            accuracies.append(accuracy)
            result = {"accuracy": accuracy, "epoch": len(accuracies)}
            if scheduler.on_trial_result(trial, result) == SchedulerDecision.STOP:
                break
        else:
            if accuracies:
                scheduler.on_trial_complete(trial, result)
        yield len(accuracies), outcome(accuracies), parameters
        number += 1


def syne_tunes_space() -> dict[str, Any]:
    from syne_tune import config_space

    def of(distribution: Any) -> Any:
        if isinstance(distribution, CategoricalDistribution):
            return config_space.choice(list(distribution.choices))
        if isinstance(distribution, IntDistribution):
            return config_space.randint(distribution.low, distribution.high)
        kind = config_space.loguniform if distribution.log else config_space.uniform
        return kind(distribution.low, distribution.high)

    return {name: of(d) for name, d in space.distributions().items() if name not in SAME}


def accuracies_of(parameters: dict[str, Any], seed: int, number: int, split: Split) -> Iterator[float]:
    """In validation, after each of the 15 epochs; ends early where the training diverges."""
    candidate = to_candidate(settings_of(seed, "random"), parameters)
    own_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    network = build(candidate.architecture, seed=own_seed)
    try:
        for epoch in train(network, candidate.recipe, split.train, split.val, seed=own_seed):
            yield epoch.eval_accuracy
    except TrainingDiverged:
        return


def outcome(accuracies: list[float]) -> float:
    """What a trial comes to; nothing if it was stopped."""
    return final_accuracy(accuracies) if len(accuracies) == space.RECIPE.epochs else math.nan


WAYS: dict[str, Callable[[int, Split], Found]] = {
    "nas-mnist": partial(with_rungs, "evolution"),
    "random, our rungs": partial(with_rungs, "random"),
    "TPE, our rungs": partial(with_rungs, "tpe"),
    "Optuna: TPE, median": plain_optuna,
    "syne-tune: ASHA": partial(syne_tune, "ASHA"),
    "syne-tune: ASHACQR": partial(syne_tune, "ASHACQR"),
    "syne-tune: BOHB": partial(syne_tune, "BOHB"),
    "syne-tune: REA": partial(syne_tune, "REA"),
}
OURS = next(iter(WAYS))


# --- searches --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One search."""

    name: str
    seed: int

    @property
    def key(self) -> str:
        return f"{self.name}/{self.seed}"


def run(job: Job, images: Images) -> dict[str, Any]:
    split = search_split(images, N_IMAGES)
    split = Split(split.train, spread(split.val, N_IMAGES))
    start = time.process_time()
    spent, n_trials, n_ended, best, course = 0, 0, 0, (-math.inf, {}), []
    for epochs, value, parameters in WAYS[job.name](job.seed, split):
        spent += epochs
        if spent > N_EPOCHS:  # a trial that would end too late does not count
            break
        n_trials, n_ended = n_trials + 1, n_ended + (not math.isnan(value))
        if value > best[0]:
            best = value, parameters
            course.append((spent, round(value, 5)))
    searched = time.process_time() - start
    candidate = to_candidate(settings_of(job.seed, "random"), best[1])
    return {
        **asdict(job), "trials": n_trials, "ended": n_ended, "course": course,
        "architecture": str(candidate.architecture), "folds": [round(a, 5) for a in on_folds(candidate, images)],
        "seconds": round(searched, 1),
    }  # fmt: skip


def on_folds(candidate: space.Candidate, images: Images) -> list[float]:
    """Accuracy of the last two epochs on folds that the search has not seen, trained on as many images."""
    accuracies = []
    for number in range(N_FOLDS):
        split = fold(images, number, partition=CONFIRM_PARTITION, n_folds=N_FOLDS)
        network = build(candidate.architecture, seed=number)
        epochs = train(network, candidate.recipe, spread(split.train, N_IMAGES), split.val, seed=number)
        accuracies.append(final_accuracy([epoch.eval_accuracy for epoch in epochs]))
    return accuracies


def work(names: list[str], n_seeds: int) -> None:
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    images = load_train(default_data_dir())

    def jobs() -> list[Job]:
        return [Job(name, seed) for seed in range(n_seeds) for name in names]

    work_off(DATA, Job, jobs, partial(run, images=images))


# --- results ---------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """What each way has found, mean over its searches ± standard error, the best first, and how it stands to ours."""
    of = {(row["name"], row["seed"]): row for row in rows}
    worth = {key: 100 * statistics.mean(row["folds"]) for key, row in of.items()}
    names = sorted({name for name, _ in of}, key=lambda name: -statistics.mean(_of(worth, name).values()))
    header = ("search", "n", "trials", "to the end", "its best says, %", "on four folds, %", "behind ours by", "in")
    body = []
    for name in names:
        own = [row for row in rows if row["name"] == name]
        on_four = list(_of(worth, name).values())
        behind = [worth[OURS, seed] - w for seed, w in _of(worth, name).items() if (OURS, seed) in worth]
        compared = name != OURS and behind
        body.append(
            (
                name,
                str(len(own)),
                f"{statistics.mean(row['trials'] for row in own):.0f}",
                f"{statistics.mean(row['ended'] for row in own):.0f}",
                f"{100 * statistics.mean(row['course'][-1][1] for row in own):.2f}",
                f"{statistics.mean(on_four):.3f}{error_text(on_four, 3)}",
                f"{statistics.mean(behind):.3f}{error_text(behind, 3)}" if compared else "",
                f"{sum(b > 0 for b in behind)} of {len(behind)}" if compared else "",
            )
        )
    return markdown_table(header, body, "l" + "r" * (len(header) - 1))


def _of(worth: dict[tuple[str, int], float], name: str) -> dict[int, float]:
    return {seed: value for (own, seed), value in worth.items() if own == name}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("search", "table"))
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.command == "table":
        print(table(read(DATA)))
        return
    prepare(default_data_dir())
    names = arguments.names or list(WAYS)
    sys.exit(not run_all(work, [(names, arguments.seeds)] * arguments.workers))


if __name__ == "__main__":
    main()
