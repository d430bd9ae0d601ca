"""What trials of a search come to when nothing stops them: trained to the end with other seeds.

    python tests/benchmarks/stopped.py train SEARCH TRIAL …
    python tests/benchmarks/stopped.py table

The networks are trials of a search in `studies/ranking/searches.jsonl`, trained on the search's images with the recipe
that their size has; a run a line is added to `stopped.jsonl`.
"""

from itertools import groupby

from jobs import append, read
from ranking import FOLDER
from searches import train_or_show, trial_of

from nas_mnist.data.folds import search_split
from nas_mnist.data.images import load_train
from nas_mnist.data.unpacking import default_data_dir
from nas_mnist.model.architecture import parse
from nas_mnist.model.network import build
from nas_mnist.study.pruner import AVERAGED_EPOCHS
from nas_mnist.study.space import reference_recipe
from nas_mnist.training.loop import train
from nas_mnist.views.tables import markdown_table

DATA = FOLDER / "stopped.jsonl"
SEEDS = (0, 1)
(RUNG,) = AVERAGED_EPOCHS


def train_twice(search: str, trial: int) -> None:
    for seed in SEEDS:
        run(search, trial, seed)


def run(search: str, trial: int, seed: int) -> None:
    row = trial_of(search, trial)
    split, network = search_split(load_train(default_data_dir())), parse(row["architecture"])
    recipe = reference_recipe(size=network.n_parameters)
    epochs = list(
        train(build(network, seed=seed), recipe, split.train, split.val, seed=seed, averaged_epochs=AVERAGED_EPOCHS)
    )
    losses = {"averaged_loss": epochs[RUNG - 1].averaged_loss, "loss": epochs[-1].eval_loss}
    rounded = {name: round(loss, 5) for name, loss in losses.items()}
    append(DATA, [{"search": search, "trial": trial, "seed": seed} | rounded | {"accuracy": epochs[-1].eval_accuracy}])


def table() -> str:
    """Losses in thousandths, of the trial and of the runs beside each other, in the order of the seeds."""
    body = []
    for (search, trial), of_trial in groupby(read(DATA), lambda run: (run["search"], run["trial"])):
        row, runs = trial_of(search, trial), list(of_trial)
        averaged = row["averaged_losses"][-1] if row["averaged_losses"] else None
        ends = f"{row['accuracy']:.2%}" if row["loss"] else f"stopped after epoch {RUNG}"
        cells = [f"`{row['architecture']}`", thousandths(row["short_loss"]), thousandths(averaged), ends]
        for name in ("averaged_loss", "loss"):
            cells.append(", ".join(thousandths(run[name]) for run in runs))
        body.append((*cells, ", ".join(f"{run['accuracy']:.2%}" for run in runs)))
    after = f"averaged, epoch {RUNG}"
    header = ("network", "short run", after, "end", f"other seeds: {after}", "end", "accuracy")
    return markdown_table(header, body, "lrrlrrr")


def thousandths(loss: float | None) -> str:
    return "–" if loss is None else f"{1000 * loss:.1f}"


if __name__ == "__main__":
    train_or_show(__doc__, train_twice, table)
