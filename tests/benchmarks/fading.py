"""Augmentation that fades: of full strength at first, of none at the end, in pairs with what is usual, on fresh folds.

    python tests/benchmarks/fading.py train [--workers 2] [--pairs 2]
    python tests/benchmarks/fading.py table

A pair is a fold and a seed. `studies/structures/fading.jsonl` is only ever added to: `train` goes on where it was cut.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from jobs import append, claim, read, run_all
from structures import FOLDER, error_text
from torch import Tensor

from nas_mnist.data.folds import CONFIRM_PARTITION, fold
from nas_mnist.data.images import Images, load_train
from nas_mnist.data.unpacking import default_data_dir, prepare
from nas_mnist.model.architecture import parse
from nas_mnist.model.network import Network, build
from nas_mnist.study.space import reference_recipe
from nas_mnist.training import loop
from nas_mnist.training.evaluation import final_accuracy
from nas_mnist.training.recipe import Recipe
from nas_mnist.training.steps import CompiledSteps
from nas_mnist.views.tables import markdown_table

DATA = FOLDER / "fading.jsonl"
LINES = (
    "c11p1 M c11k1- d12p1 d14p1 d13p1 d14p1 G c16k1 c10k1- | hardswish",
    "c15 M c14 c14 c15 c14 G c10k1- | hardswish",
)
# Times the usual strength, at this part of the training: 0 at its start, 1 at its end.
WAYS: dict[str, Callable[[float], float]] = {
    "usual": lambda done: 1.0,
    "fades in the last third": lambda done: min(1.0, 3 * (1 - done)),
    "fades all along": lambda done: 1 - done,
    "fades all along, from 1.6 times": lambda done: 1.6 * (1 - done),
}
USUAL = next(iter(WAYS))


class FadingSteps(CompiledSteps):
    """The package's steps, with the strength that each call has by how much of the training is done."""

    def __init__(
        self,
        way: Callable[[float], float],
        network: Network,
        recipe: Recipe,
        images: Images,
        generator: torch.Generator,
        rates: Sequence[float] | None = None,
    ):
        super().__init__(network, recipe, images, generator)
        self._way, self._usual = way, recipe.augmentation
        self._n_done, self._n_steps = 0, recipe.epochs * loop.n_batches(len(images), recipe)

    def run(self, positions: Tensor, rates: Sequence[float]) -> tuple[float, int]:
        self._augmentation = self._usual.times(self._way(self._n_done / self._n_steps))
        self._n_done += len(rates)
        return super().run(positions, rates)


@dataclass(frozen=True)
class Job:
    line: str
    way: str
    pair: int

    @property
    def key(self) -> str:
        return f"{self.line}/{self.way}/{self.pair}"


def run(job: Job, images: Images) -> dict[str, Any]:
    split = fold(images, job.pair, partition=CONFIRM_PARTITION)
    seed, start = 100 + job.pair, time.process_time()
    loop.make_steps = partial(FadingSteps, WAYS[job.way])
    epochs = list(loop.train(build(parse(job.line), seed=seed), reference_recipe(), split.train, split.val, seed=seed))
    return {
        **asdict(job), "loss": round(epochs[-1].eval_loss, 6),
        "acc": round(final_accuracy([epoch.eval_accuracy for epoch in epochs]), 5),
        "train": round(epochs[-1].train_loss, 5), "s": round(time.process_time() - start, 1),
    }  # fmt: skip


def work(n_pairs: int) -> None:
    torch.set_num_threads(1)
    images = load_train(default_data_dir())

    def jobs() -> list[Job]:
        return [Job(line, way, pair) for pair in range(n_pairs) for line in LINES for way in WAYS]

    def done() -> set[str]:
        return {Job(row["line"], row["way"], row["pair"]).key for row in read(DATA)}

    while job := claim(FOLDER, jobs, done):
        row = run(job, images)
        append(DATA, [row])
        print(row, flush=True)


def table(rows: list[dict[str, Any]]) -> str:
    """Differences to what is usual, of the same fold and seed: loss in thousandths, accuracy in points, ± error."""
    of = {(r["line"], r["way"], r["pair"]): r for r in rows}
    header = ("network", "augmentation", "n", "loss, thousandths", "accuracy, points", "training loss")
    body = []
    for line in LINES:
        for way in WAYS:
            own = [(r, of[line, USUAL, p]) for (name, w, p), r in of.items() if (name, w) == (line, way)]
            losses = [1000 * (r["loss"] - (way != USUAL) * usual["loss"]) for r, usual in own]
            accuracies = [100 * (r["acc"] - (way != USUAL) * usual["acc"]) for r, usual in own]
            sign = "" if way == USUAL else "+"
            body.append(
                (
                    f"`{line}`",
                    way,
                    str(len(own)),
                    f"{statistics.mean(losses):{sign}.2f}{error_text(losses)}",
                    f"{statistics.mean(accuracies):{sign}.3f}{error_text(accuracies, 3)}",
                    f"{statistics.mean(r['train'] for r, _ in own):.4f}",
                )
            )
    return markdown_table(header, body, "ll" + "r" * (len(header) - 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "table"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.command == "table":
        print(table(read(DATA)))
        return
    prepare(default_data_dir())
    sys.exit(not run_all(work, [(arguments.pairs,)] * arguments.workers))


if __name__ == "__main__":
    main()
