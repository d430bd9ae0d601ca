"""Which strategy finds the best network for its epochs: hundreds of searches, played on a model of real trainings.

    pip install scikit-learn
    python tests/benchmarks/strategies.py [--repeats 20] [--epochs 450] [NAME …]

The model is a random forest, fitted to the short trainings of `studies/ranking/` (see `ranking.py` and `searches.py`):
it says what a candidate would come to, and a search sees that with the noise of a real one. Every strategy is a sampler
and a pruner of Optuna, ours those of the package. What a repeat came to is added to `studies/ranking/strategies.jsonl`.
"""

import argparse
import itertools
import math
import statistics
import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import optuna
from jobs import append, read
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState
from ranking import FOLDER, results
from scipy.stats import norm
from searches import searches
from sklearn.ensemble import RandomForestRegressor
from sklearn.model_selection import cross_val_predict

from nas_mnist.data.datasets import MNIST
from nas_mnist.model.architecture import Architecture, Conv, parse
from nas_mnist.study import space
from nas_mnist.study.predictor import Predictor
from nas_mnist.study.pruner import BEGINNING, RUNGS, SHORT_EPOCHS, SHORT_RUN, RungPruner, best_first
from nas_mnist.study.records import short_run_of, write_epochs, write_short_run
from nas_mnist.study.sampler import EvolutionSampler, Proposal, decided
from nas_mnist.study.storage import experimental
from nas_mnist.training.loop import EpochResult
from nas_mnist.training.recipe import Recipe

MAX_PARAMS, EPOCHS, MODEL_EPOCHS = 2000, 15, 3
NOISE = {BEGINNING: 0.25, SHORT_RUN: 0.15, 5: 0.16, EPOCHS: 0.10}  # SD of what is seen at a rung, in log(error)
RANGES, SAME = space.distributions(), decided(MNIST)


# --- the model -------------------------------------------------------------------------------------------------------


def features(architecture: Architecture, recipe: Recipe) -> list[float]:
    """What a candidate is, in numbers that do not depend on how it was drawn."""
    convs = [layer for layer in architecture.layers if isinstance(layer, Conv) and layer.kernel == 3 and layer.norm]
    pointwise = [layer for layer in architecture.layers if isinstance(layer, Conv) and layer.kernel == 1]
    widths = [math.log(layer.channels) for layer in convs]
    return [
        len(convs),
        str(architecture.line).split().count("M"),
        sum(layer.separable for layer in convs) / len(convs),
        widths[0],
        widths[-1],
        min(widths),
        statistics.mean(widths),
        statistics.pstdev(widths),
        min((math.log(layer.channels) for layer in pointwise[:-1]), default=5.0),
        convs[0].padding,
        "c10k1- G" in architecture.line,
        "c10- G" in architecture.line or "c10p1- G" in architecture.line,
        math.log(architecture.n_parameters),
        math.log(architecture.n_macs),
        architecture.receptive_field,
        architecture.dropout,
        architecture.activation == "relu",
        math.log(recipe.learning_rate),
        math.log(recipe.weight_decay),
        math.log(recipe.batch_size),
    ]


def table() -> tuple[np.ndarray, np.ndarray]:
    """Features of what was trained with a complete schedule of three epochs, and less the logarithm of the error."""
    short = [
        (parse(job.architecture), job.build_recipe(), run["accuracy"][-1])
        for job, run in results()
        if job.epochs == MODEL_EPOCHS
    ]
    recipe = space.reference_recipe(epochs=MODEL_EPOCHS)
    for row in itertools.chain(*searches().values()):
        if row["short_accuracy"] and (architecture := parse(row["architecture"])).n_parameters < MAX_PARAMS:
            short.append((architecture, replace(recipe, **row["recipe"]), row["short_accuracy"]))
    x = [features(architecture, recipe) for architecture, recipe, _ in short]
    y = [-math.log(1.0001 - accuracy) for _, _, accuracy in short]
    return np.array(x), np.array(y)


def fit() -> tuple[RandomForestRegressor, int, float]:
    """The forest, the number of its trainings, and the correlation of what it predicts with what was left out."""
    x, y = table()
    forest = RandomForestRegressor(200, min_samples_leaf=2, random_state=0)
    predicted = cross_val_predict(forest, x, y, cv=min(10, len(y)))
    return forest.fit(x, y), len(y), float(np.corrcoef(predicted, y)[0, 1])


# --- strategies ------------------------------------------------------------------------------------------------------


class Unpredicted(EvolutionSampler):
    """Ours without the predictor."""

    n_learned = math.inf


class ExpectedParents(EvolutionSampler):
    """Ours, but the best are those of what was seen, less luck: three tenths of it is what the predictor expects."""

    def propose(self, trials: list[FrozenTrial]) -> Proposal:
        seen, self._best_first = self._best_first, lambda drawn: self._expected(seen(drawn))
        try:
            return super().propose(trials)
        finally:
            self._best_first = seen

    def _expected(self, ranked: list[FrozenTrial]) -> list[FrozenTrial]:
        if len(ranked) < self.n_learned:
            return ranked
        n, candidates = len(ranked), [self._tried[trial.number] for trial in ranked]
        predictor = Predictor(candidates)
        expected = np.array([predictor.expected(candidate) for candidate in candidates])
        worth = 0.7 * norm.isf((np.arange(n) + 0.5) / n) + 0.3 * expected
        return [ranked[i] for i in np.argsort(-worth, kind="stable")]


class ReluToo(EvolutionSampler):
    """And a mutation may go back to ReLU, as often as it changes any other of some seventeen parameters."""

    def _mutation(self, parent: FrozenTrial) -> Proposal:
        proposal = super()._mutation(parent)
        activation = parent.params["activation"]
        if self._rng.random() < 1.5 / 17:
            activation = "relu" if activation == "hardswish" else "hardswish"
        return replace(proposal, parameters={**proposal.parameters, "activation": activation})


class LocalSearch(Unpredicted):
    """Mutations of the one best."""

    def _choose_parent(self, ranked: list[FrozenTrial]) -> FrozenTrial:
        return ranked[0]


class RegularisedEvolution(Unpredicted):
    """The best of five of the 25 youngest: E. Real et al., Regularized Evolution for Image Classifier Search, 2019."""

    def _choose_parent(self, ranked: list[FrozenTrial]) -> FrozenTrial:
        youngest = {trial.number for trial in sorted(ranked, key=lambda trial: -trial.number)[:25]}
        alive = [trial for trial in ranked if trial.number in youngest]
        return alive[min(self._rng.integers(len(alive), size=5))]


class NoShares(Unpredicted):
    """Ours without the share that every kind of network has."""

    def _choose_parent(self, ranked: list[FrozenTrial]) -> FrozenTrial:
        return ranked[self._rng.integers(min(len(ranked), 6))]


def _candidate(parameters: dict[str, Any]) -> space.Candidate:
    return space.to_candidate(parameters, max_params=MAX_PARAMS, epochs=EPOCHS)


def _ours(kind: type[EvolutionSampler], seed: int) -> BaseSampler:
    return kind(RANGES, _candidate, space.reference_recipe(size=MAX_PARAMS), SAME, best_first, seed)


def _optunas(kind: Callable[..., BaseSampler], seed: int, **settings: Any) -> BaseSampler:
    with experimental():
        return optuna.samplers.PartialFixedSampler(SAME, kind(seed=seed, **settings))


SAMPLERS: dict[str, Callable[[int], BaseSampler]] = {
    "random": partial(_optunas, optuna.samplers.RandomSampler),
    "TPE": partial(_optunas, optuna.samplers.TPESampler, n_startup_trials=20),
    "GP": partial(_optunas, optuna.samplers.GPSampler, n_startup_trials=20),
    "NSGA-II": partial(_optunas, optuna.samplers.NSGAIISampler, population_size=16),
    "local search": partial(_ours, LocalSearch),
    "regularised evolution": partial(_ours, RegularisedEvolution),
    "evolution, no shares": partial(_ours, NoShares),
    "evolution, no predictor": partial(_ours, Unpredicted),
    "evolution, ReLU too": partial(_ours, ReluToo),
    "evolution, expected parents": partial(_ours, ExpectedParents),
    "evolution": partial(_ours, EvolutionSampler),
}
OURS = ("evolution", "rungs")
PRUNERS = {"15 epochs each": optuna.pruners.NopPruner, "rungs": RungPruner}


def play(name: str, pruner: str, seed: int, n_epochs: int, predict: Callable[[space.Candidate], float]) -> list[Any]:
    """One search of so many epochs: pairs of epochs spent and the true worth of what it would have chosen by then."""
    rng = np.random.default_rng([seed, zlib.crc32(f"{name}/{pruner}".encode())])
    study = optuna.create_study(direction="maximize", sampler=SAMPLERS[name](seed), pruner=PRUNERS[pruner]())
    spent, best, course = 0, (-math.inf, 0.0), []
    while spent < n_epochs:
        trial = study.ask()
        worth = predict(_candidate(space.suggest(trial)))
        epochs, seen = _train(trial, worth, rng)
        spent += epochs
        if seen is None:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, seen)
            best = max(best, (seen, worth))
        course.append((spent, round(best[1], 4)))
    return course


def _train(trial: optuna.Trial, worth: float, rng: np.random.Generator) -> tuple[int, float | None]:
    """As the objective would: epochs trained, and the result, None if it was stopped."""
    seen = {rung: worth + rng.normal(0, NOISE[rung]) for rung in (*RUNGS, EPOCHS)}
    blank = [EpochResult(epoch, *[0.0] * 7) for epoch in range(1, EPOCHS + 1)]  # nobody asks what else there was
    pruned = not isinstance(trial.study.pruner, optuna.pruners.NopPruner)
    for rung in sorted(RUNGS) if pruned else ():
        loss = math.exp(-seen[rung])
        if rung <= SHORT_RUN:
            epoch = SHORT_EPOCHS + rung
            write_short_run(trial, [*short_run_of(trial), replace(blank[epoch - 1], eval_loss=loss)])
        else:
            write_epochs(trial, [*blank[: rung - 1], replace(blank[rung - 1], averaged_loss=loss)])
        if rung >= SHORT_RUN:
            trial.report(0.0, rung)
        if trial.should_prune():
            return SHORT_EPOCHS + rung, None
    write_epochs(trial, [*blank[:-1], replace(blank[-1], eval_loss=math.exp(-seen[EPOCHS]))])
    return SHORT_EPOCHS * pruned + EPOCHS, seen[EPOCHS]


# --- results ---------------------------------------------------------------------------------------------------------


def summary(rows: list[dict[str, Any]], n_epochs: int) -> list[str]:
    """A table of what each strategy came to after this many epochs and at half of them, the best first."""
    header = ("sampler", "pruner", "n", f"error at {n_epochs // 2} epochs, %", f"at {n_epochs}", "behind ours")
    lines = [_row(header), _row(["---"] * len(header))]
    groups: dict[tuple[str, str], dict[int, Any]] = {}
    for row in rows:
        groups.setdefault((row["sampler"], row["pruner"]), {})[row["seed"]] = row["course"]
    ours = groups.get(OURS, {})
    for group, courses in sorted(groups.items(), key=lambda item: -_mean_worth(item[1], n_epochs)):
        errors = [_spread([100 * math.exp(-_at(c, n)) for c in courses.values()]) for n in (n_epochs // 2, n_epochs)]
        pairs = [_at(ours[s], n_epochs) > _at(c, n_epochs) for s, c in courses.items() if s in ours and group != OURS]
        lines.append(_row([*group, len(courses), *errors, f"{sum(pairs)} of {len(pairs)}" if pairs else ""]))
    return lines


def _row(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _spread(values: list[float]) -> str:
    """Mean ± standard error."""
    error = f" ± {statistics.stdev(values) / math.sqrt(len(values)):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{error}"


def _at(course: list[Any], n_epochs: int) -> float:
    return next((worth for spent, worth in reversed(course) if spent <= n_epochs), course[0][1])


def _mean_worth(courses: dict[int, Any], n_epochs: int) -> float:
    return statistics.mean(_at(course, n_epochs) for course in courses.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(SAMPLERS), metavar="NAME")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--pruners", nargs="+", choices=list(PRUNERS), default=list(PRUNERS))
    parser.add_argument("--epochs", type=int, default=450, help="that a search may spend")
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    forest, n, correlation = fit()
    print(f"a forest of {n} trainings of {MODEL_EPOCHS} epochs; correlation with those left out {correlation:.2f}")

    def predict(candidate: space.Candidate) -> float:
        return float(forest.predict([features(candidate.architecture, candidate.recipe)])[0])

    path = FOLDER / "strategies.jsonl"
    done = {(row["sampler"], row["pruner"], row["seed"]) for row in read(path) if row["n"] == n}
    for seed in range(options.repeats):
        for name in options.names:
            for pruner in options.pruners:
                if (name, pruner, seed) not in done:
                    course = play(name, pruner, seed, options.epochs, predict)
                    append(path, [{"sampler": name, "pruner": pruner, "seed": seed, "n": n, "course": course}])
    print("\n".join(summary([row for row in read(path) if row["n"] == n], options.epochs)))


if __name__ == "__main__":
    main()
