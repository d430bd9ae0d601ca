"""The two pictures of the README, drawn from the committed studies: `python studies/pictures.py`

The result: what was found, on the test set, beside what was published of the networks that people designed. And a
search as its terminal shows it: the first trials of `unaided.db`, given to the display as they happened.
"""

import shutil
import tempfile
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console

from nas_mnist.model.zoo import MARKS, ZOO
from nas_mnist.stages import retrain
from nas_mnist.stages.search import SearchBegan, SearchSettings
from nas_mnist.stages.trial import EpochTrained, TrialEnded, TrialStarted
from nas_mnist.study import studies
from nas_mnist.study.pruner import SHORT_EPOCHS
from nas_mnist.study.records import TrialRecord, how_far
from nas_mnist.study.storage import Storage
from nas_mnist.task import MAX_EPOCHS, MAX_PARAMS, TARGET_ACCURACY
from nas_mnist.views.progress import SearchDisplay
from nas_mnist.views.tables import plus_minus
from nas_mnist.workers.events import Worker

CANONICAL = Path(__file__).with_name("canonical")
UNAIDED = Path(__file__).with_name("unaided")
FOUND = (  # database, its study, what it is, colour
    (UNAIDED / "unaided.db", "nas-mnist", "found unaided", "C0"),
    (UNAIDED / "below-2000.db", "nas-mnist", "found unaided below 2,000", "C0"),
    (UNAIDED / "below-1000.db", "nas-mnist", "found unaided below 1,000", "C0"),
    (CANONICAL / "canonical.db", "soap", "put in by hand, winner of three studies", "C2"),
)
N_REPLAYED = 8  # trials of a search that have ended, before two that run
# Where names lie that would lie on others: shift in points, and which end of the name is there.
LABELS = {
    "step-by-step": (2, 9, "right"),
    "lite-m4": (7, -11, "left"),
    "eva-drilldown": (-7, -3, "right"),
    "after 2,000 epochs, the best of 700 runs": (7, -14, "left"),
}
BESIDE = (7, -3, "left")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:  # whoever opens the database writes to it
        copies = {path: Storage.parse(shutil.copy(path, folder)) for path, *_ in FOUND}
        draw_result(copies).savefig(CANONICAL / "result.png", dpi=130)
        console = record_search(copies[UNAIDED / "unaided.db"])
        console.save_svg(str(CANONICAL / "search.svg"), title="nas-mnist search --no-warm-start --trials 100")


def draw_result(storages: dict[Path, Storage]) -> Figure:
    """Test accuracy after the last epoch against parameters; mean ± SD between seeds for what was found here."""
    figure = Figure(figsize=(8.5, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.axhline(100 * TARGET_ACCURACY, color="0.6", linewidth=1, linestyle="--")
    axes.axvline(MAX_PARAMS, color="0.6", linewidth=1, linestyle="--")
    axes.annotate("the task: 99.4 % below 8,000", (2250, 100 * TARGET_ACCURACY + 0.01), color="0.4", fontsize=8)
    for name, system in ZOO.items():
        _draw_published(axes, name, system.n_parameters, system.published_accuracy, "^")
    for mark in MARKS:
        _draw_published(axes, mark.remark, mark.n_parameters, mark.accuracy, "*")
    for path, name, label, color in FOUND:
        r = retrain.results(storages[path].open(), name)[0]
        axes.errorbar(
            r.verdict.n_parameters, 100 * r.mean, 100 * r.standard_deviation, fmt="o", color=color, capsize=4, zorder=3,
            label=f"{label}: {100 * r.mean:.2f}{plus_minus(r.standard_deviation)} %, n = {len(r.runs)}",
        )  # fmt: skip
    axes.plot([], [], "^", color="C1", label="designed by hand, as published: one run")
    axes.plot([], [], "*", color="C1", label="other published marks")
    axes.set(xlabel="parameters", ylabel="test accuracy in %", xlim=(0, 9000), ylim=(98.2, 99.68))
    axes.xaxis.set_major_formatter(lambda n, _: f"{n:,.0f}")
    axes.grid(alpha=0.25)
    axes.legend(loc="lower left", fontsize=9)
    return figure


def _draw_published(axes, name: str, n_parameters: int, accuracy: float, marker: str) -> None:
    x, y, end = LABELS.get(name, BESIDE)
    point = (n_parameters, 100 * accuracy)
    axes.plot(*point, marker, color="C1", markersize=7)
    axes.annotate(name, point, xytext=(x, y), textcoords="offset points", ha=end, fontsize=8, color="0.35")


@dataclass
class Clock:
    """What the replayed search takes for the time."""

    seconds: float = 0.0


def record_search(storage: Storage) -> Console:
    """A console in which the first trials of a real search have gone by, two more in their midst."""
    trials = studies.load(storage.open(), "nas-mnist").get_trials(deepcopy=False)
    clock = Clock()
    console = Console(record=True, width=112, force_terminal=True, file=StringIO(), get_time=lambda: clock.seconds)
    workers = [Worker(0, "cpu"), Worker(1, "cpu")]
    display = SearchDisplay(console, SearchSettings(storage), workers, quiet=False, verbose=False)
    display(None, SearchBegan(0, None))
    following = trials[N_REPLAYED:]
    trained_longer = next(trial for trial in following if TrialRecord.from_trial(trial).epochs)
    running = (trained_longer, next(trial for trial in following if trial is not trained_longer))
    for i, trial in enumerate((*trials[:N_REPLAYED], *running)):
        worker, record = workers[i % 2], TrialRecord.from_trial(trial)
        display(worker, TrialStarted(trial.number, record.architecture, record.n_parameters))
        epochs = [(epoch, SHORT_EPOCHS) for epoch in record.short_run] + [
            (epoch, MAX_EPOCHS) for epoch in record.epochs
        ]
        ended = trial not in running
        for epoch, of in epochs if ended else epochs[: 7 if trial is trained_longer else 2]:
            clock.seconds += (epoch.train_seconds + epoch.eval_seconds) / len(workers)
            display(worker, EpochTrained(trial.number, epoch, of=of))
        if ended:
            is_complete = trial.state == trial.state.COMPLETE
            accuracy, stopped = (trial.value, "") if is_complete else (None, how_far(trial))
            display(worker, TrialEnded(trial.number, False, stopped, accuracy))
    console.print(display._render())
    return console


if __name__ == "__main__":
    main()
