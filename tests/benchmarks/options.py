"""A network with an option and without, trained in full by the package's own steps, in pairs on fresh folds.

    python tests/benchmarks/options.py train [OPTION …] [--workers 2] [--pairs 6]
    python tests/benchmarks/options.py table

A pair is a fold and a seed. `studies/structures/options.jsonl` is only ever added to: `train` goes on where it was
cut.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from jobs import read, run_all, work_off
from scipy.stats import ttest_1samp
from structures import FOLDER, error_text

from nas_mnist.data.folds import CONFIRM_PARTITION, fold
from nas_mnist.data.images import Images, load_train
from nas_mnist.data.unpacking import default_data_dir, prepare
from nas_mnist.model.architecture import parse
from nas_mnist.model.network import build
from nas_mnist.study.space import reference_recipe
from nas_mnist.training.evaluation import final_accuracy
from nas_mnist.training.loop import train
from nas_mnist.views.tables import markdown_table

DATA = FOLDER / "options.jsonl"
LINES = {  # without, by the option that is added
    "hardswish": (
        "c9 c7k1 M d10 d14 d18 d24 G c10k1-",
        "c6 d15 d8 c5k1- M c13 c24 c16 G c15k1 c10k1-",
        "c20 d24 d44 M c22k1- d24 d36 d44 c10k1- G",
    ),
    "deskew": (
        "c15 M c14 c14 c15 c14 G c10k1- | hardswish",
        "c13 M c14k1 d14 d16 d9 d19 c10k1- G | hardswish",
        "c5 c6k1- M d7 d8 d9 d17 G c10k1- | hardswish",
        "c4 d4 M d5 d5 d5 c10k1- G | hardswish",
    ),
}


def having(line: str, option: str) -> str:
    return f"{line} {option}" if "|" in line else f"{line} | {option}"


@dataclass(frozen=True)
class Job:
    line: str
    pair: int

    @property
    def key(self) -> str:
        return f"{self.line}/{self.pair}"


def jobs_of_pairs(options: Sequence[str], n_pairs: int) -> list[Job]:
    """The first pair of every network before the second of any."""
    return [
        Job(which, pair)
        for pair in range(n_pairs)
        for option in options
        for line in LINES[option]
        for which in (line, having(line, option))
    ]


def run(job: Job, images: Images) -> dict[str, Any]:
    split = fold(images, job.pair, partition=CONFIRM_PARTITION)
    seed, start = 100 + job.pair, time.process_time()
    network = build(parse(job.line), seed=seed)
    recipe = reference_recipe(size=network.architecture.n_parameters)
    epochs = list(train(network, recipe, split.train, split.val, seed=seed))
    return {
        **asdict(job),
        "loss": round(epochs[-1].eval_loss, 6),
        "acc": final_accuracy([epoch.eval_accuracy for epoch in epochs]),
        "train": round(epochs[-1].train_loss, 5),
        "s": round(time.process_time() - start, 1),
    }


def work(jobs: list[Job]) -> None:
    torch.set_num_threads(1)
    work_off(DATA, Job, lambda: jobs, partial(run, images=load_train(default_data_dir())))


def table(rows: list[dict[str, Any]], option: str) -> str:
    """What the option changes: cross-entropy in thousandths, accuracy in points, ± standard error."""
    of = {(r["line"], r["pair"]): r for r in rows}
    header = (
        "network",
        "n",
        "without: loss",
        "accuracy, %",
        f"{option}: loss",
        "p",
        "accuracy, points",
        "training loss",
    )
    body = [_row(line, option, of) for line in LINES[option]]
    return markdown_table(header, [row for row in body if row], "l" + "r" * (len(header) - 1))


def _row(line: str, option: str, of: dict[tuple[str, int], dict[str, Any]]) -> tuple[str, ...]:
    changed = having(line, option)
    pairs = [(row, of[changed, p]) for (name, p), row in of.items() if name == line and (changed, p) in of]
    if not pairs:
        return ()
    losses = [1000 * (there["loss"] - row["loss"]) for row, there in pairs]
    accuracies = [100 * (there["acc"] - row["acc"]) for row, there in pairs]
    mean = statistics.mean
    before, after = mean(row["train"] for row, _ in pairs), mean(there["train"] for _, there in pairs)
    return (
        f"`{line}`",
        str(len(pairs)),
        f"{1000 * mean(row['loss'] for row, _ in pairs):.2f}",
        f"{100 * mean(row['acc'] for row, _ in pairs):.3f}",
        f"{mean(losses):+.2f}{error_text(losses)}",
        f"{ttest_1samp(losses, 0).pvalue:.3f}" if len(losses) > 1 else "",
        f"{mean(accuracies):+.3f}{error_text(accuracies, 3)}",
        f"{before:.4f} → {after:.4f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "table"))
    parser.add_argument("options", nargs="*", metavar="OPTION", help=f"of {', '.join(LINES)}; all if none is named")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=6)
    arguments = parser.parse_args()
    options = arguments.options or list(LINES)
    if arguments.command == "table":
        print("\n\n".join(table(read(DATA), option) for option in options))
        return
    prepare(default_data_dir())
    sys.exit(not run_all(work, [(jobs_of_pairs(options, arguments.pairs),)] * arguments.workers))


if __name__ == "__main__":
    main()
