"""Over which part of the training the weights are averaged: the loss of several means after epoch 5, in the same runs.

    python tests/benchmarks/windows.py train SEARCH TRIAL …
    python tests/benchmarks/windows.py table

The networks are trials of a search in `studies/ranking/searches.jsonl`, trained again from their own seeds with the
augmentation that their size has now; a result a line is added to `windows.jsonl`.
"""

import statistics
from dataclasses import replace

import numpy as np
from jobs import append, read
from ranking import FOLDER
from searches import train_or_show, trial_of

from nas_mnist.data.folds import search_split
from nas_mnist.data.images import Images, load_train
from nas_mnist.data.unpacking import default_data_dir
from nas_mnist.model.architecture import parse
from nas_mnist.model.network import Network, build
from nas_mnist.study.space import reference_recipe
from nas_mnist.training import loop
from nas_mnist.training.averaging import AveragedWeights
from nas_mnist.views.tables import markdown_table

DATA = FOLDER / "windows.jsonl"
WINDOWS = (1 / 5, 1 / 10, 1 / 20, 1 / 40)
EPOCH = 5


class Means:
    """In the place of `AveragedWeights`: one for each window."""

    def __init__(self, network: Network):
        self._all = [AveragedWeights(network, window) for window in WINDOWS]

    def update(self) -> None:
        for averaged in self._all:
            averaged.update()

    def evaluate(self, train_images: Images, val_images: Images) -> tuple[list[float], None]:
        return [round(averaged.evaluate(train_images, val_images)[0], 5) for averaged in self._all], None


def run(search: str, number: int) -> None:
    row, split = trial_of(search, number), search_split(load_train(default_data_dir()))
    network = parse(row["architecture"])
    recipe = replace(reference_recipe(size=network.n_parameters), **row["recipe"])
    seed = int(np.random.SeedSequence([int(search.split("seed ")[1][0]), number]).generate_state(1)[0])
    loop.AveragedWeights = Means
    epochs = loop.train(build(network, seed=seed), recipe, split.train, split.val, seed=seed, averaged_epochs=(EPOCH,))
    epoch = next(epoch for epoch in epochs if epoch.number == EPOCH)
    means = {f"1/{1 / window:.0f}": loss for window, loss in zip(WINDOWS, epoch.averaged_loss, strict=True)}
    append(DATA, [{"search": search, "trial": number, "own": round(epoch.eval_loss, 5), "means": means}])


def table() -> str:
    """Mean and largest loss in thousandths, of the weights themselves and of each mean."""
    rows = read(DATA)
    names = list(rows[0]["means"])
    body = []
    for search in dict.fromkeys(row["search"] for row in rows):
        own = [row for row in rows if row["search"] == search]
        losses = [[row["own"] for row in own], *([row["means"][name] for row in own] for name in names)]
        cells = [f"{1000 * statistics.mean(column):.1f}; {1000 * max(column):.1f}" for column in losses]
        body.append((search, str(len(own)), *cells))
    header = ("mean; largest loss, thousandths", "n", "no mean", *(f"of the last {name}" for name in names))
    return markdown_table(header, body, "l" + "r" * (len(header) - 1))


if __name__ == "__main__":
    train_or_show(__doc__, run, table)
