"""What whole searches came to: their trials as text, tables, and how the best grows with the epochs spent.

    python tests/benchmarks/searches.py add NAME DATABASE [--study nas-mnist]   # also its confirmation, if there is one
    python tests/benchmarks/searches.py tables                                  # and the picture; no training

Each search was one command (`nas-mnist search`, then `nas-mnist confirm --folds 4`); `studies/ranking/README.md` tells
of them. `add` keeps of a database what the tables need, a trial a line, in `studies/ranking/searches.jsonl`.
"""

import argparse
import math
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jobs import append, read
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial
from ranking import FOLDER, interval, spearman

from nas_mnist.data.unpacking import default_data_dir, prepare
from nas_mnist.model.architecture import Conv, MaxPool, parse
from nas_mnist.study import studies
from nas_mnist.study.predictor import Predictor
from nas_mnist.study.pruner import AVERAGED_EPOCHS, BEGINNING, LATE_GAINS, N_RECENT, RUNGS, SHORT_EPOCHS, SHORT_RUN
from nas_mnist.study.records import TrialRecord, is_trained, n_epochs, planned_values
from nas_mnist.study.sampler import N_LEARNED
from nas_mnist.study.space import Candidate, reference_recipe
from nas_mnist.study.storage import Storage
from nas_mnist.views.tables import markdown_table

DATA = FOLDER / "searches.jsonl"
DISTINCTIVE = ("learning_rate", "weight_decay", "batch_size")  # of a recipe: what tells trials of one search apart


def add(name: str, storage: Storage, study: str) -> None:
    """Append the trials of a search that were trained, in the order in which they ended."""
    opened = storage.open()
    confirmation = f"{study}-confirm"
    confirmed = trials_of(opened, confirmation) if confirmation in studies.names(opened) else []
    accuracies = {
        planned_values(t)["trial"]: TrialRecord.from_trial(t).accuracies for t in confirmed if t.value is not None
    }
    trials = [t for t in trials_of(opened, study) if t.state.is_finished() and is_trained(t)]
    trials.sort(key=lambda t: t.datetime_complete)
    append(DATA, [{"search": name, **row(trial, accuracies)} for trial in trials])


def trials_of(opened: Any, study: str) -> list[FrozenTrial]:
    return studies.load(opened, study).get_trials(deepcopy=False)


def row(trial: FrozenTrial, confirmed: dict[int, tuple[float, ...]]) -> dict[str, Any]:
    """Losses in nats, accuracies as fractions, seconds of one core."""
    record = TrialRecord.from_trial(trial)
    complete = trial.state.name == "COMPLETE"
    judged = {epoch.number: epoch for epoch in record.short_run}
    early, short = judged.get(1), judged.get(SHORT_EPOCHS)
    return {
        "trial": trial.number,
        "architecture": record.architecture,
        "recipe": {name: rounded(getattr(record.recipe, name)) for name in DISTINCTIVE},
        "origin": record.origin,
        "parent": record.parent,
        "epochs": n_epochs(trial),
        "seconds": round(record.seconds, 1),
        "early_loss": rounded(early.eval_loss) if early else None,
        "short_loss": rounded(short.eval_loss) if short else None,
        "short_accuracy": rounded(short.eval_accuracy) if short else None,
        "averaged_losses": [rounded(epoch.averaged_loss) for epoch in record.epochs if epoch.averaged_loss],
        "loss": rounded(record.epochs[-1].eval_loss) if complete else None,
        "accuracy": rounded(trial.value) if complete else None,
        "confirmed": [rounded(a) for a in confirmed.get(trial.number, ())],
    }


def rounded(value: float) -> float:
    return round(value, 5)


# --- tables ----------------------------------------------------------------------------------------------------------


def searches() -> dict[str, list[dict[str, Any]]]:
    return {name: list(rows) for name, rows in groupby(read(DATA), key=lambda row: row["search"])}


def table_of_searches(found: dict[str, list[dict[str, Any]]]) -> str:
    header = ("search", "trials", "to the end", "epochs a trial", "core-minutes", "best, %", "confirmed, %", "network")
    return markdown_table(header, [_row(name, rows) for name, rows in found.items()], "lrrrrrll")


def _row(name: str, rows: list[dict[str, Any]]) -> tuple[Any, ...]:
    ended = [row for row in rows if row["accuracy"]]
    best = max(ended, key=lambda row: row["accuracy"])
    confirmed = max((row for row in ended if row["confirmed"]), key=_confirmed, default=None)
    spread = 100 * statistics.stdev(confirmed["confirmed"]) if confirmed else None
    return (
        name,
        len(rows),
        len(ended),
        f"{statistics.mean(row['epochs'] for row in rows):.1f}",
        f"{sum(row['seconds'] for row in rows) / 60:.0f}",
        f"{100 * best['accuracy']:.2f}",
        f"{100 * _confirmed(confirmed):.2f} ± {spread:.2f}" if confirmed else "–",
        f"`{(confirmed or best)['architecture']}`",
    )


def _confirmed(row: dict[str, Any]) -> float:
    return statistics.mean(row["confirmed"])


def table_of_signals(found: dict[str, list[dict[str, Any]]]) -> str:
    """How what a rung goes by ranks those that were trained to the end, by their loss there; and the better half."""
    lines = []
    for name, rows in found.items():
        ended = [row for row in rows if row["loss"] and row["short_loss"]]
        ends = -np.log([row["loss"] for row in ended])
        signals = {"short run": [-row["short_loss"] for row in ended]}
        if all(row["averaged_losses"] for row in ended):
            averaged = [-row["averaged_losses"][-1] for row in ended]
            signals[f"averaged weights, epoch {AVERAGED_EPOCHS[-1]}"] = averaged
            both = zip(ended, averaged, strict=True)
            smaller = [max(own, -row["short_loss"]) for row, own in both]
            signals["the smaller of both"] = smaller
            late = [math.exp(-LATE_GAINS[AVERAGED_EPOCHS[-1]] * separable(row)) for row in ended]
            signals["and what separable layers gain"] = list(np.multiply(smaller, late))
        for signal, values in signals.items():
            if len(ended) > 5:
                parts = [np.arange(len(ends)), np.argsort(-ends)[: (len(ends) + 1) // 2]]
                lines.append((name, signal, len(ended), *(_rank(np.array(values)[p], ends[p]) for p in parts)))
    header = ("search", "signal", "n", "rank correlation with the end (90 %)", "better half")
    return markdown_table(header, lines, "llrll")


def _rank(a: np.ndarray, b: np.ndarray) -> str:
    low, high = interval(a, b)
    return f"{spearman(a, b):.2f} ({low:.2f} – {high:.2f})"


def table_of_beginnings(found: dict[str, list[dict[str, Any]]]) -> str:
    """What the first epoch of a short run says of its end, and whom it stops: of searches that stopped nobody there."""
    lines = []
    for name, rows in found.items():
        known = sorted(
            (row for row in rows if row.get("early_loss") and row["short_loss"]), key=lambda row: row["trial"]
        )
        if len(known) == len(rows):
            early, end = (np.array([row[f"{when}_loss"] for row in known]) for when in ("early", "short"))
            is_last = [_is_stopped(early[max(0, n + 1 - N_RECENT) : n + 1]) for n in range(len(known))]
            passed = [last for last, row in zip(is_last, known, strict=True) if row["epochs"] > SHORT_EPOCHS]
            lines.append((name, len(known), _rank(early, end), sum(is_last), f"{sum(passed)} of {len(passed)}"))
    header = ("search", "n", "rank correlation (90 %)", "would be stopped", "of those that passed the short run")
    return markdown_table(header, lines, "lrlrl")


def _is_stopped(losses: np.ndarray) -> bool:
    """Whether the last of these is, by the pruner's rule."""
    return bool((losses[:-1] < losses[-1]).sum() >= math.ceil(RUNGS[BEGINNING] * len(losses)))


def table_of_late_gains(found: dict[str, list[dict[str, Any]]]) -> str:
    """How much less loss separable layers come to than others that stood where they did: logarithms, within searches.

    A regression on what was seen and on the share of separable layers. The last row is of networks that were all
    trained to the end, whatever their short runs (`plan.jsonl`, below 2,000 parameters).
    """
    averaged = {"averaged weights → end": lambda row: row["averaged_losses"][-1]}
    averaged["the smaller of both → end"] = lambda row: min(row["averaged_losses"][-1], row["short_loss"])
    steps = {"first epoch of a short run → its end": (lambda row: row.get("early_loss"), "short_loss")}
    steps["short run → end"] = (lambda row: row["short_loss"], "loss")
    steps |= {
        step: (lambda row, see=see: row["averaged_losses"] and see(row), "loss") for step, see in averaged.items()
    }
    lines = []
    for step, (see, end) in steps.items():
        known = ([row for row in rows if row["short_loss"] and see(row) and row[end]] for rows in found.values())
        parts = [[(see(row), separable(row), row[end]) for row in rows] for rows in known if len(rows) > 5]
        lines.append((step, sum(map(len, parts)), len(parts), *_late_gain(parts)))
    unselected = [_of_the_plan()]
    lines.append(("short run → end, all", len(unselected[0]), "–", *_late_gain(unselected)))
    header = ("from → to", "n", "searches", "slope", "separable against dense", "in what was seen")
    return markdown_table(header, lines, "lrrrrr")


def _late_gain(parts: list[list[tuple[float, float, float]]]) -> tuple[str, str, str]:
    """Slope, effect with its standard error, and how much that is worth beforehand."""
    logs = [np.array([(math.log(seen), share, math.log(end)) for seen, share, end in part]) for part in parts]
    centred = np.concatenate([own - own.mean(0) for own in logs])
    x, y = centred[:, :2], centred[:, 2]
    weights = np.linalg.solve(x.T @ x, x.T @ y)
    variance = float(((y - x @ weights) ** 2).sum()) / (len(y) - len(parts) - 2)
    error = math.sqrt(variance * np.linalg.inv(x.T @ x)[1, 1])
    return f"{weights[0]:.2f}", f"{weights[1]:.3f} ± {error:.3f}", f"{weights[1] / weights[0]:.2f}"


def _of_the_plan() -> list[tuple[float, float, float]]:
    planned = {job["candidate"]: job for job in read(FOLDER / "plan.jsonl")}
    runs: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for run in read(FOLDER / "runs.jsonl"):
        candidate, epochs, *_ = run["job"].split("/")
        runs[candidate][epochs].append(run["loss"][-1])
    mean = statistics.mean
    both = {name: own for name, own in runs.items() if "3" in own and "15" in own}
    return [(mean(own["3"]), separable(planned[name]), mean(own["15"])) for name, own in both.items()]


def separable(row: dict[str, Any]) -> float:
    """The share of separable layers among the convolutions over pixels, the first apart, which is plain."""
    _, *others = (layer for layer in parse(row["architecture"]).layers if isinstance(layer, Conv) and layer.kernel > 1)
    return sum(layer.separable for layer in others) / max(len(others), 1)


def table_of_kinds(found: dict[str, list[dict[str, Any]]]) -> str:
    """Random draws by their kind: loss after the short run, against the median draw of the same search."""
    against: dict[str, list[float]] = defaultdict(list)
    won: Counter[str] = Counter()
    for rows in found.values():
        drawn = [row for row in rows if row["origin"] == "random" and row["short_loss"]]
        if drawn:
            losses = [late_loss(row) for row in drawn]
            median = statistics.median(losses)
            for row, loss in zip(drawn, losses, strict=True):
                against[_kind(row)].append(loss / median)
            won[_kind(max(rows, key=lambda row: _confirmed(row) if row["confirmed"] else 0.0))] += any(
                row["confirmed"] for row in rows
            )
    lines = []
    for kind, losses in sorted(against.items()):
        figures = (f"{figure:.2f}" for figure in (statistics.median(losses), np.quantile(losses, 0.25), min(losses)))
        lines.append((kind, len(losses), *figures, won[kind]))
    header = ("separable layers, blocks", "draws", "median", "best quarter up to", "best", "searches won")
    return markdown_table(header, lines, "lrrrrr")


def _kind(row: dict[str, Any]) -> str:
    share = separable(row)
    blocks = 1 + sum(isinstance(layer, MaxPool) for layer in parse(row["architecture"]).layers)
    return f"{'none' if share == 0 else 'all' if share == 1 else 'some'}, {blocks}"


def late_loss(row: dict[str, Any]) -> float:
    """That of the short run, less what separable layers gain until the end."""
    return float(row["short_loss"] * math.exp(-LATE_GAINS[SHORT_RUN] * separable(row)))


def table_of_predictions(found: dict[str, list[dict[str, Any]]]) -> str:
    """How the sampler's predictor, fitted to the short runs before, ranks the next one: all in their order."""
    lines = []
    for name, rows in found.items():
        known = sorted((row for row in rows if row["short_loss"]), key=lambda row: row["trial"])
        if len(known) > N_LEARNED + 2:
            expected = [_expected(known[:n], known[n]) for n in range(N_LEARNED, len(known))]
            parts = {
                "mutations": [i for i, row in enumerate(known[N_LEARNED:]) if row["parent"] is not None],
                "random draws": [i for i, row in enumerate(known[N_LEARNED:]) if row["parent"] is None],
            }
            losses = np.array([row["short_loss"] for row in known[N_LEARNED:]])
            for part, own in parts.items():
                if len(own) > 4:
                    lines.append((name, part, len(own), _rank(np.array(expected)[own], -losses[own])))
    return markdown_table(("search", "proposals", "n", "rank correlation (90 %)"), lines, "llrl")


def _expected(before: list[dict[str, Any]], row: dict[str, Any]) -> float:
    ranked = sorted(before, key=lambda row: row["short_loss"])
    return Predictor([_candidate(row) for row in ranked]).expected(_candidate(row))


def _candidate(row: dict[str, Any]) -> Candidate:
    return Candidate(parse(row["architecture"]), replace(reference_recipe(), **row["recipe"]))


def table_of_draws(found: dict[str, list[dict[str, Any]]]) -> str:
    """What random draws come to in their short runs."""
    lines = []
    for name, rows in found.items():
        values = [100 * row["short_accuracy"] for row in rows if row["origin"] == "random" and row["short_accuracy"]]
        if values:
            figures = (statistics.median(values), np.quantile(values, 0.75), max(values))
            lines.append((name, len(values), *(f"{figure:.2f}" for figure in figures)))
    return markdown_table(("search", "n", "median, %", "best quarter from", "best"), lines, "lrrrr")


def table_of_noise(found: dict[str, list[dict[str, Any]]]) -> str:
    """Components of variance of what was confirmed, candidates × folds: as standard deviations, in points of %."""
    lines = []
    for name, rows in found.items():
        x = 100 * np.array([row["confirmed"] for row in rows if row["confirmed"]])
        if len(x) > 2:
            n_candidates, n_folds = x.shape
            candidates, folds = x.mean(1, keepdims=True), x.mean(0, keepdims=True)
            rest = ((x - candidates - folds + x.mean()) ** 2).sum() / ((n_candidates - 1) * (n_folds - 1))
            of_candidates = max(0.0, float(candidates.var(ddof=1)) - rest / n_folds)
            of_folds = max(0.0, float(folds.var(ddof=1)) - rest / n_candidates)
            searched = statistics.mean(100 * row["accuracy"] for row in rows if row["confirmed"])
            components = (f"{math.sqrt(v):.3f}" for v in (of_candidates, of_folds, rest))
            lines.append((name, n_candidates, n_folds, *components, f"{searched - x.mean():.2f}"))
    header = ("search", "candidates", "folds", "candidate", "fold", "run, and the rest", "search's images flatter by")
    return markdown_table(header, lines, "lrrrrrr")


def family(rows: list[dict[str, Any]]) -> str:
    """The best confirmed network's ancestors, the first of them first."""
    by_number = {row["trial"]: row for row in rows}
    last = max((row for row in rows if row["confirmed"]), key=_confirmed)
    line = [last]
    while line[-1]["parent"] is not None:
        line.append(by_number[line[-1]["parent"]])
    cells = [
        (row["trial"], _reached(row), row["origin"].split(": ")[-1], f"`{row['architecture']}`") for row in line[::-1]
    ]
    return markdown_table(("trial", "reached", "change", "network"), cells, "rlll")


def _reached(row: dict[str, Any]) -> str:
    return f"{100 * row['accuracy']:.2f} %" if row["accuracy"] else f"stopped, {row['epochs']} epochs in all"


def draw_picture(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """The best so far, on the search's validation images, against the epochs spent; a dot for the confirmed.

    A panel for each budget.
    """
    budgets = sorted({budget_of(name) for name in found})
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    for axes, budget in zip(figure.subplots(-(-len(budgets) // 2), 2, sharex=True).flat, budgets, strict=False):
        for name, rows in found.items():
            if budget_of(name) == budget:
                _draw_search(axes, name.replace(f", below {budget:,}", ""), rows)
        axes.set(yscale="log", title=f"below {budget:,} parameters")
        low, high = axes.get_ylim()
        axes.set_ylim(low, high * (high / low) ** 0.5)  # room for the legend
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.legend(fontsize=8, loc="upper right")
    figure.supxlabel("epochs trained, those of short runs counted in", fontsize=10)
    figure.supylabel("error of the best so far on the search's validation images, %; dots: on four folds", fontsize=10)
    figure.savefig(path, dpi=110)


def budget_of(search: str) -> int:
    """Below how many parameters it searched; the first ones, whose names do not say it, below 2,000."""
    named = re.search(r"below ([\d,]+\d)", search)
    return int(named[1].replace(",", "")) if named else 2000


def _draw_search(axes: Axes, name: str, rows: list[dict[str, Any]]) -> None:
    epochs = list(accumulate(row["epochs"] for row in rows))
    best = list(accumulate((100 * (1 - (row["accuracy"] or 0)) for row in rows), min))
    begun = next(i for i, error in enumerate(best) if error < 100)
    (line,) = axes.step(epochs[begun:], best[begun:], where="post", label=name)
    if confirmed := [row for row in rows if row["confirmed"]]:
        error = 100 * (1 - max(map(_confirmed, confirmed)))
        axes.plot(epochs[-1], error, "o", color=line.get_color(), markersize=8)


def trial_of(search: str, trial: int) -> dict[str, Any]:
    """What is kept of it."""
    (row,) = [row for row in read(DATA) if (row["search"], row["trial"]) == (search, trial)]
    return row


def train_or_show(description: str, run: Callable[[str, int], None], table: Callable[[], str]) -> None:
    """The commands of a benchmark that trains trials of a search again: `train SEARCH TRIAL …` and `table`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    training.add_argument("search")
    training.add_argument("trials", nargs="+", type=int)
    commands.add_parser("table")
    arguments = parser.parse_args()
    if arguments.command == "table":
        print(table())
        return
    torch.set_num_threads(1)
    prepare(default_data_dir())
    for trial in arguments.trials:
        run(arguments.search, trial)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add")
    adding.add_argument("name")
    adding.add_argument("database")
    adding.add_argument("--study", default="nas-mnist")
    commands.add_parser("tables")
    arguments = parser.parse_args()
    if arguments.command == "add":
        if arguments.name in searches():
            parser.error(f"there is a search {arguments.name!r} already: give another name")
        add(arguments.name, Storage.parse(arguments.database), arguments.study)
        return
    found = searches()
    tables = (
        table_of_searches,
        table_of_signals,
        table_of_beginnings,
        table_of_late_gains,
        table_of_kinds,
        table_of_predictions,
        table_of_draws,
        table_of_noise,
    )
    print(*(table(found) for table in tables), sep="\n\n")
    for name, rows in found.items():
        if any(row["confirmed"] for row in rows):
            print(f"\n{name}\n\n{family(rows)}")
    draw_picture(found, FOLDER / "searches.png")


if __name__ == "__main__":
    main()
