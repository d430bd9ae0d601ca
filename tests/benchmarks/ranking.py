"""What a search should draw, and what it should stop by: short and long trainings of many candidates, and their tables.

    python tests/benchmarks/ranking.py train [--workers 2]    # what is in the plan and was not yet trained
    python tests/benchmarks/ranking.py tables                 # from studies/ranking/, no training

`studies/ranking/plan.jsonl` says what is trained, one job a line, in order; `runs.jsonl` what came of it. Both are only
ever added to, so that a run can be cut at any time, and continued by the same command.
"""

import argparse
import math
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jobs import append, claim, read, run_all
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from nas_mnist.data.folds import Split, fold
from nas_mnist.data.images import load_train
from nas_mnist.data.unpacking import default_data_dir, prepare
from nas_mnist.model.architecture import parse
from nas_mnist.model.network import build
from nas_mnist.study import space
from nas_mnist.task import MAX_EPOCHS
from nas_mnist.training.augmentation import Augmentation
from nas_mnist.training.loop import train
from nas_mnist.training.recipe import Recipe

FOLDER = Path(__file__).parents[2] / "studies" / "ranking"
AVERAGED_EPOCHS = (1, 2, 3, 5, 8)
COLUMNS = {
    "train_loss": "train_loss",
    "loss": "eval_loss",
    "accuracy": "eval_accuracy",
    "mean_loss": "averaged_loss",
    "mean_accuracy": "averaged_accuracy",
}


@dataclass(frozen=True)
class Job:
    """One training: what, for how long, on which fold, from which seed."""

    part: str  # space, signal, short, table
    draw: str  # the way it was drawn
    candidate: str
    architecture: str
    max_params: int
    epochs: int
    partition: int
    fold: int
    seed: int
    recipe: dict[str, Any]  # where it is not the reference recipe

    @property
    def key(self) -> str:
        return f"{self.candidate}/{self.epochs}/{self.partition}.{self.fold}/{self.seed}"

    def build_recipe(self) -> Recipe:
        changes = dict(self.recipe)
        if "augmentation" in changes:
            changes["augmentation"] = Augmentation(**changes["augmentation"])
        return replace(space.reference_recipe(epochs=self.epochs), **changes)


def run(job: Job, split: Split) -> dict[str, Any]:
    """Columns of the run, a value an epoch: training loss, validation loss and accuracy, those of averaged weights."""
    network = build(parse(job.architecture), seed=job.seed)
    averaged = AVERAGED_EPOCHS if job.part == "signal" else ()
    start = time.process_time()
    epochs = list(train(network, job.build_recipe(), split.train, split.val, seed=job.seed, averaged_epochs=averaged))
    fields = {column: field for column, field in COLUMNS.items() if averaged or "averaged" not in field}
    columns = {column: [_rounded(getattr(epoch, field)) for epoch in epochs] for column, field in fields.items()}
    return {"job": job.key, "seconds": round(time.process_time() - start, 1), **columns}


def _rounded(value: float | None) -> float | None:
    return value if value is None else round(value, 5)


def read_plan(folder: Path = FOLDER) -> list[Job]:
    return [Job(**row) for row in read(folder / "plan.jsonl")]


def work(folder: Path) -> None:
    """Train the jobs of the plan that nobody has trained or is training, until there are none."""
    torch.set_num_threads(1)
    images = load_train(default_data_dir())
    while job := claim(folder, lambda: read_plan(folder), lambda: {row["job"] for row in read(folder / "runs.jsonl")}):
        split = fold(images, job.fold, partition=job.partition)
        result = run(job, split)
        append(folder / "runs.jsonl", [result])
        print(job.part, job.key, job.architecture, result["accuracy"][-1], result["seconds"], flush=True)


# --- tables ----------------------------------------------------------------------------------------------------------

N_BOOTSTRAP = 2000
FEWEST_DRAWS = 3  # of a kind, to be drawn as a distribution


def results(folder: Path = FOLDER) -> list[tuple[Job, dict[str, Any]]]:
    """Every finished training, with its job."""
    jobs = {job.key: job for job in read_plan(folder)}
    return [(jobs[row["job"]], row) for row in read(folder / "runs.jsonl") if row["job"] in jobs]


def space_table(found: list[tuple[Job, dict[str, Any]]]) -> list[str]:
    """What random draws come to, in % of the search's validation images, by the way they are drawn."""
    accuracies: dict[str, list[float]] = {}
    for job, row in found:
        if job.part == "space":
            accuracies.setdefault(job.draw, []).append(100 * row["accuracy"][-1])
    lines = ["| draw | n | median | best quarter from | best |", "| --- | --- | --- | --- | --- |"]
    for draw, values in sorted(accuracies.items(), key=lambda item: statistics.median(item[1])):
        quarter = np.quantile(values, 0.75)
        lines.append(
            f"| {draw} | {len(values)} | {statistics.median(values):.2f} | {quarter:.2f} | {max(values):.2f} |"
        )
    return lines


def signals(found: list[tuple[Job, dict[str, Any]]]) -> dict[str, np.ndarray]:
    """By name, what each full run showed on its way, the larger the better; `truth` is what it came to: less the
    logarithm of its loss at the end, of the candidate's other runs if there are any."""
    runs = [(job, row) for job, row in found if job.epochs == MAX_EPOCHS and row.get("mean_loss")]
    ends: dict[str, list[tuple[str, float]]] = {}
    for job, row in runs:
        ends.setdefault(job.candidate, []).append((job.key, -math.log(row["loss"][-1])))
    columns: dict[str, list[float]] = {"truth": []}
    for job, row in runs:
        own = ends[job.candidate]
        others = [end for key, end in own if key != job.key] or [own[0][1]]
        columns["truth"].append(statistics.mean(others))
        for epoch in AVERAGED_EPOCHS:
            for name, sign in (
                ("accuracy", 1),
                ("loss", -1),
                ("mean_accuracy", 1),
                ("mean_loss", -1),
                ("train_loss", -1),
            ):
                columns.setdefault(f"{NAMES[name]}, epoch {epoch}", []).append(sign * row[name][epoch - 1])
    return {name: np.array(values) for name, values in columns.items()}


NAMES = {
    "accuracy": "accuracy",
    "loss": "cross-entropy",
    "mean_accuracy": "accuracy of averaged weights",
    "mean_loss": "cross-entropy of averaged weights",
    "train_loss": "training loss",
}


def signal_table(columns: dict[str, np.ndarray]) -> list[str]:
    """Rank correlation with the truth, over all and over the better half, and what keeping the best third loses."""
    truth = columns["truth"]
    n, better = len(truth), np.argsort(-truth)[: (len(truth) + 1) // 2]
    lines = [
        f"| signal | epoch | Spearman, all {n} (90 %) | better {len(better)} | has the best in its best third |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, values in columns.items():
        if name != "truth":
            text, epoch = name.split(", epoch ")
            kept = np.argsort(-values)[: -(-n // 3)]
            low, high = interval(values, truth)
            overall = f"{spearman(values, truth):.2f} ({low:.2f} – {high:.2f})"
            half = f"{spearman(values[better], truth[better]):.2f}"
            lines.append(f"| {text} | {epoch} | {overall} | {half} | {'yes' if truth.argmax() in kept else 'no'} |")
    return lines


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    return float(spearmanr(a, b).statistic)


def interval(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """90 % bootstrap interval of the rank correlation."""
    rng = np.random.default_rng(0)
    samples = [rng.integers(len(a), size=len(a)) for _ in range(N_BOOTSTRAP)]
    values = [spearman(a[i], b[i]) for i in samples if len(set(i)) > 2]
    return float(np.nanquantile(values, 0.05)), float(np.nanquantile(values, 0.95))


def draw_picture(found: list[tuple[Job, dict[str, Any]]], path: Path) -> None:
    """The error of random draws as a distribution, and how signals rank as training goes on."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    draws: dict[str, list[float]] = {}
    for job, row in found:
        if job.part == "space":
            draws.setdefault(job.draw, []).append(100 * (1 - row["accuracy"][-1]))
    enough = {draw: errors for draw, errors in draws.items() if len(errors) >= FEWEST_DRAWS}
    for draw, errors in sorted(enough.items(), key=lambda item: -statistics.median(item[1])):
        shares = np.arange(1, len(errors) + 1) / len(errors)
        left.step(sorted(errors), shares, where="post", marker=".", label=f"{draw} (n = {len(errors)})")
    left.set(xscale="log", xlabel="error after a complete schedule of 3 epochs, %", ylabel="share of draws")
    left.xaxis.set_major_formatter("{x:g}")
    left.xaxis.set_minor_formatter("{x:g}")
    columns = signals(found)
    for text in NAMES.values():
        curve = [spearman(columns[f"{text}, epoch {epoch}"], columns["truth"]) for epoch in AVERAGED_EPOCHS]
        right.plot(AVERAGED_EPOCHS, curve, marker="o", label=text, linestyle="-" if "averaged" in text else "--")
    right.set(xlabel="epoch of 15", ylabel=f"rank correlation with the end (n = {len(columns['truth'])})")
    for axes in (left, right):
        axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "tables"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    if options.command == "tables":
        found = results(options.folder)
        print("\n".join([*space_table(found), "", *signal_table(signals(found))]))
        draw_picture(found, options.folder / "ranking.png")
        return
    prepare(default_data_dir())
    sys.exit(not run_all(work, [(options.folder,)] * options.workers))


if __name__ == "__main__":
    main()
