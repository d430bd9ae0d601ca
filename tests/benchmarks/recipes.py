"""Which recipe suits which size: batch, rate and augmentation, in pairs with what is usual, on folds of a confirmation.

    python tests/benchmarks/recipes.py train [WAY …] [--workers 2] [--pairs 2] [--sizes 1000 2000 …]
    python tests/benchmarks/recipes.py table

A pair is a fold and a seed. `studies/structures/recipes.jsonl` is only ever added to: `train` goes on where it was cut.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from jobs import read, run_all, work_off
from scipy.stats import ttest_1samp
from structures import FOLDER, error_text
from torch import Tensor

from nas_mnist.data.folds import CONFIRM_PARTITION, fold
from nas_mnist.data.images import Images, load_train
from nas_mnist.data.unpacking import default_data_dir, prepare
from nas_mnist.model.architecture import parse
from nas_mnist.model.network import Network, build
from nas_mnist.study.space import reference_recipe
from nas_mnist.training import loop
from nas_mnist.training.augmentation import Augmentation
from nas_mnist.training.evaluation import final_accuracy
from nas_mnist.training.recipe import Recipe
from nas_mnist.training.steps import CompiledSteps, make_steps
from nas_mnist.views.tables import markdown_table

DATA = FOLDER / "recipes.jsonl"
LINES = {
    500: "c4 d4 M d5 d5 d5 c10k1- G | hardswish",
    1000: "c6 d6 M c7k1- d7 d7 d10 d10 c10k1- G | hardswish",
    2000: "c11p1 M c11k1- d12p1 d14p1 d13p1 d14p1 G c16k1 c10k1- | hardswish",
    4000: "c10 M c10 c10 c10 c10 G c10k1- | hardswish",
    8000: "c15 M c14 c14 c15 c14 G c10k1- | hardswish",
}
USUAL = "64, 0.01, 1"
BATCHES, RATES, STRENGTHS = (64, 32), (0.01, 0.014, 0.02, 0.03, 0.05), (1.5, 1.0, 0.75, 0.5, 0.25)
# Times the usual strength, when this part of the training is done: 0 at its start, 1 at its end.
FADING: dict[str, Callable[[float], float]] = {
    "fades in the last third": lambda done: min(1.0, 3 * (1 - done)),
    "fades all along": lambda done: 1 - done,
    "fades all along, from 1.6 times": lambda done: 1.6 * (1 - done),
}
WAYS = [*(f"{batch}, {rate:g}, {s:g}" for batch in BATCHES for rate in RATES for s in STRENGTHS), *FADING]


def recipe_of(way: str) -> Recipe:
    """Images a batch, the learning rate, and the augmentation's strength, times what is usual; or the usual, fading."""
    batch, rate, strength = map(float, (USUAL if way in FADING else way).split(", "))
    augmentation = Augmentation().times(strength)
    return replace(reference_recipe(), batch_size=int(batch), learning_rate=rate, augmentation=augmentation)


class FadingSteps(CompiledSteps):
    """The package's steps, with the strength that each call has by how much of the training is done."""

    def __init__(
        self,
        fading: Callable[[float], float],
        network: Network,
        recipe: Recipe,
        images: Images,
        generator: torch.Generator,
        rates: Sequence[float] | None = None,
    ):
        super().__init__(network, recipe, images, generator)
        self._fading, self._usual = fading, recipe.augmentation
        self._n_done, self._n_steps = 0, recipe.epochs * loop.n_batches(len(images), recipe)

    def run(self, positions: Tensor, rates: Sequence[float]) -> tuple[float, int]:
        self._augmentation = self._usual.times(self._fading(self._n_done / self._n_steps))
        self._n_done += len(rates)
        return super().run(positions, rates)


@dataclass(frozen=True)
class Job:
    size: int
    way: str
    pair: int

    @property
    def key(self) -> str:
        return f"{self.size}/{self.way}/{self.pair}"


def run(job: Job, images: Images) -> dict[str, Any]:
    split = fold(images, job.pair, partition=CONFIRM_PARTITION)
    seed, start = 100 + job.pair, time.process_time()
    network = build(parse(LINES[job.size]), seed=seed)
    loop.make_steps = partial(FadingSteps, FADING[job.way]) if job.way in FADING else make_steps
    epochs = list(loop.train(network, recipe_of(job.way), split.train, split.val, seed=seed))
    return {
        **asdict(job), "loss": round(epochs[-1].eval_loss, 5),
        "acc": round(final_accuracy([epoch.eval_accuracy for epoch in epochs]), 5),
        "train": round(epochs[-1].train_loss, 5), "s": round(time.process_time() - start, 1),
    }  # fmt: skip


def work(jobs: list[Job]) -> None:
    torch.set_num_threads(1)
    images = load_train(default_data_dir())

    work_off(DATA, Job, lambda: jobs, partial(run, images=images))


def table(rows: list[dict[str, Any]]) -> str:
    """Differences to what is usual, of the same fold and seed: loss in thousandths, accuracy in points, ± error."""
    of = {(r["size"], r["way"], r["pair"]): r for r in rows}
    header = ("below", "batch, rate, augmentation", "n", "loss, thousandths", "p", "accuracy, points", "training loss")
    body = []
    for size, way in sorted(dict.fromkeys((s, w) for s, w, _ in of), key=lambda key: (key[0], key[1] != USUAL, key[1])):
        own = [(r, of[size, USUAL, p]) for (s, w, p), r in of.items() if (s, w) == (size, way) and (s, USUAL, p) in of]
        if not own:
            continue
        usual = way == USUAL
        losses = [1000 * (r["loss"] - (0 if usual else before["loss"])) for r, before in own]
        accuracies = [100 * (r["acc"] - (0 if usual else before["acc"])) for r, before in own]
        sign = "" if usual else "+"
        body.append(
            (
                f"{size:,}",
                way,
                str(len(own)),
                f"{statistics.mean(losses):{sign}.1f}{error_text(losses, 1)}",
                "" if usual or len(own) < 2 else f"{ttest_1samp(losses, 0).pvalue:.3f}",
                f"{statistics.mean(accuracies):{sign}.2f}{error_text(accuracies, 2)}",
                f"{statistics.mean(r['train'] for r, _ in own):.3f}",
            )
        )
    return markdown_table(header, body, "ll" + "r" * (len(header) - 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "table"))
    parser.add_argument("ways", nargs="*", metavar="WAY", help=f"such as '{USUAL}'")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--sizes", type=int, nargs="+", choices=list(LINES), default=list(LINES))
    arguments = parser.parse_args()
    if arguments.command == "table":
        print(table(read(DATA)))
        return
    prepare(default_data_dir())
    ways = arguments.ways or WAYS
    jobs = [Job(size, way, pair) for pair in range(arguments.pairs) for way in ways for size in arguments.sizes]
    sys.exit(not run_all(work, [(jobs,)] * arguments.workers))


if __name__ == "__main__":
    main()
