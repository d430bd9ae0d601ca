"""What a search shows while it runs and when it is done: a live display on a terminal, plain lines elsewhere."""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from nas_mnist.model.architecture import Limits
from nas_mnist.stages.confirm import ConfirmSettings
from nas_mnist.stages.planned import RunsBegan, RunStarted
from nas_mnist.stages.retrain import RetrainSettings
from nas_mnist.stages.search import SearchBegan, SearchSettings, Summary
from nas_mnist.stages.trial import EpochTrained, TrialEnded, TrialStarted
from nas_mnist.study.records import TrialRecord
from nas_mnist.study.storage import Outage, OutageEnded
from nas_mnist.workers.events import Worker, WorkerDied


@dataclass
class _Line:
    """What one worker is at."""

    started: TrialStarted | None = None
    trained: EpochTrained | None = None  # the last epoch
    n_epochs: int = 0  # of the short run and the long one


class SearchDisplay:
    """Follows the events of a search. Live if the console is a terminal; else a line for each finished trial."""

    def __init__(
        self, console: Console, settings: SearchSettings, workers: list[Worker], *, quiet: bool, verbose: bool
    ):
        self._console, self._settings, self._quiet, self._verbose = console, settings, quiet, verbose
        self._lines = {worker.index: _Line() for worker in workers}
        self._devices = {worker.index: worker.device for worker in workers}
        self._best: tuple[float, TrialStarted] | None = None
        self._n_trained = self._n_over_budget = 0
        self._epochs_done, self._epochs_here = 0.0, 0
        self._start = console.get_time()
        self._progress = Progress(
            TextColumn("[bold]trials"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            get_time=console.get_time,
        )
        self._task = self._progress.add_task("", total=settings.n_trials, left="")
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4, transient=True)

    def __enter__(self) -> "SearchDisplay":
        if self._console.is_terminal and not self._quiet:
            self._live.start()
        return self

    def __exit__(self, *_) -> None:
        self._live.stop()

    def __call__(self, worker: Worker | None, event: Any) -> None:
        """Take in one event; this is what `search` calls."""
        match event:
            case SearchBegan():
                self._take_over(event)
            case TrialStarted():
                self._lines[worker.index] = _Line(event)
            case EpochTrained(epoch=epoch):
                line = self._lines[worker.index]
                n = epoch.number - (line.trained.epoch.number if line.trained and line.trained.of == event.of else 0)
                self._epochs_here += n
                line.trained, line.n_epochs = event, line.n_epochs + n
                if self._verbose:
                    self._say(
                        f"  trial {event.trial}: {_epoch(event, self._settings)}, {epoch.eval_accuracy:.2%}, "
                        f"loss {epoch.eval_loss:.4f}, {epoch.train_seconds + epoch.eval_seconds:.1f} s"
                    )
            case TrialEnded():
                self._end(self._lines[worker.index], event)
                self._lines[worker.index] = _Line()
            case WorkerDied():
                self._say(f"{died(worker, event)}; its trial is queued again")
                self._lines[worker.index] = _Line()
            case Outage() | OutageEnded():
                self._say(outage(worker, event))
        self._progress.update(self._task, completed=self._n_trained, left=self._time_left())

    def _take_over(self, event: SearchBegan) -> None:
        self._n_trained = event.n_trained
        if event.best:
            record = TrialRecord.from_trial(event.best)
            started = TrialStarted(record.number, record.architecture, record.n_parameters)
            self._best = event.best.value, started
        if event.n_trained:
            self._say(f"{event.n_trained} trials of study {self._settings.study_name!r} are trained already")

    def _end(self, line: _Line, event: TrialEnded) -> None:
        if event.over_budget:
            self._n_over_budget += 1
            if self._verbose:
                self._say(f"trial {event.trial}: over the budget, not trained")
            return
        self._n_trained += 1
        self._epochs_done += 1
        started = line.started or TrialStarted(event.trial, "?", 0)
        if event.accuracy is not None and (self._best is None or event.accuracy > self._best[0]):
            self._best = event.accuracy, started
        outcome = f"{event.accuracy:.2%}" if event.accuracy is not None else f"pruned {event.stopped}"
        self._say(
            f"{self._n_trained}/{self._settings.n_trials}  trial {event.trial}: {outcome}, "
            f"{started.n_parameters:,} parameters, {started.architecture}"
        )

    def _say(self, text: str) -> None:
        if not self._quiet:
            self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _time_left(self) -> str:
        """From the epochs and trials of this run; unknown before the first trial has ended."""
        if not self._epochs_done:
            return ""
        in_flight = sum(line.n_epochs for line in self._lines.values())
        per_trial = (self._epochs_here - in_flight) / self._epochs_done  # epochs, pruning counted in
        left = max(0.0, (self._settings.n_trials - self._n_trained) * per_trial - in_flight)
        seconds = (self._console.get_time() - self._start) / max(1, self._epochs_here) * left
        return f"about {duration(seconds)} left"

    def _render(self) -> Group:
        table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
        for index, line in self._lines.items():
            table.add_row(f"[dim]{self._devices[index]} #{index}", *self._cells(line))
        best = Text("no candidate has been trained to the end yet", style="dim")
        if self._best:
            accuracy, started = self._best
            best = Text(
                f"best {accuracy:.2%}  {started.n_parameters:,} parameters  {started.architecture}", style="green"
            )
        return Group(self._progress, table, best)

    def _cells(self, line: _Line) -> tuple[str, str, str, str]:
        if line.started is None:
            return "[dim]waiting", "", "", ""
        if line.trained is None:
            begins = "short run" if self._settings.has_short_runs else "epoch 0"
            return f"trial {line.started.trial}", begins, "", line.started.architecture
        accuracy = f"{line.trained.epoch.eval_accuracy:.2%}"
        return f"trial {line.started.trial}", _epoch(line.trained, self._settings), accuracy, line.started.architecture


def _epoch(event: EpochTrained, settings: SearchSettings) -> str:
    return f"{'epoch' if event.of == settings.epochs else 'short run,'} {event.epoch.number}/{event.of}"


class RunDisplay:
    """Follows planned runs: a bar over all epochs on a terminal, and a line for each finished run."""

    def __init__(self, console: Console):
        self._console = console
        self._epochs_per_run = self._n_epochs = 0  # of all runs together, those done and those to come
        self._names: dict[int, str] = {}  # by worker
        self._epochs: dict[int, int] = {}  # by worker, of the run it is at
        self._progress = Progress(
            TextColumn("[bold]epochs"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[names]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            speed_estimate_period=600,
        )
        self._task = self._progress.add_task("", total=None, names="")

    def __enter__(self) -> "RunDisplay":
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()

    def __call__(self, worker: Worker | None, event: Any) -> None:
        """Take in one event; this is what `run_planned` calls."""
        match event:
            case RunsBegan(n_left=n_left, n_done=n_done, epochs_per_run=epochs_per_run):
                self._epochs_per_run, self._n_epochs = epochs_per_run, n_left * epochs_per_run
                if n_done:
                    self._say(f"runs done already: {n_done}; left: {n_left}")
            case RunStarted(name=name):
                self._names[worker.index] = name
            case EpochTrained():
                self._epochs[worker.index] = self._epochs.get(worker.index, 0) + 1
                self._progress.advance(self._task)
            case TrialEnded(accuracy=accuracy):
                self._n_epochs -= self._epochs_per_run - self._epochs.pop(worker.index, 0)  # it may be given up
                outcome = "ended early" if accuracy is None else f"{accuracy:.2%}"
                self._say(f"{self._names.pop(worker.index, '?')}: {outcome}")
            case WorkerDied():
                self._n_epochs += self._epochs.pop(worker.index, 0)  # once more
                self._say(f"{died(worker, event)}; its run is queued again")
            case Outage() | OutageEnded():
                self._say(outage(worker, event))
        self._progress.update(self._task, total=self._n_epochs or None, names=", ".join(self._names.values()))

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)


@contextmanager
def follow(console: Console, stage: SearchSettings | ConfirmSettings | RetrainSettings, workers: list[Worker]):
    """The display of one stage of several, with a line that says which it is."""
    if isinstance(stage, SearchSettings):
        what = f"searching below {stage.max_params:,} parameters{_limits(stage.limits)}, to {stage.n_trials} trials"
        shown = SearchDisplay(console, stage, workers, quiet=False, verbose=False)
    else:
        confirming = isinstance(stage, ConfirmSettings)
        what = "confirming the best" if confirming else f"retraining {stage.chosen.name} with {stage.n_seeds} seeds"
        shown = RunDisplay(console)
    console.print(f"[bold]{what}[/] (study {escape(repr(stage.study_name))})")
    with shown:
        yield shown


def _limits(limits: Limits) -> str:
    named = {"multiply-adds": limits.max_macs, "bytes of RAM": limits.max_ram}
    return "".join(f", up to {limit:,} {what}" for what, limit in named.items() if limit is not None)


def died(worker: Worker, event: WorkerDied) -> str:
    """One line: a traceback's last says what happened, and the rest is kept for the error that ends the run."""
    return f"worker {worker.index} died ({event.reason.splitlines()[-1]}) and is started again"


def outage(worker: Worker, event: Outage | OutageEnded) -> str:
    """One line when a worker begins to wait for the storage's server, and one when it goes on."""
    if isinstance(event, OutageEnded):
        return f"worker {worker.index} goes on: the storage answers again after {duration(event.seconds)}"
    patience = duration(event.patience_seconds)
    return f"worker {worker.index} waits, up to {patience}: the storage does not answer; {event.reason}"


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, or 2 h 05 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02} min"


def print_summary(console: Console, settings: SearchSettings, summary: Summary) -> None:
    """What the search has come to, and what to type next."""
    counts = summary.counts
    full = summary.epochs_trained + summary.epochs_saved
    rows = {
        "trained": f"{counts.trained} of {settings.n_trials} trials, {counts.pruned} of them pruned early",
        "over budget": f"{counts.over_budget} (recorded, never trained)",
        "failed": f"{counts.failed} (queued again up to twice)" if counts.failed else "0",
        "epochs": f"{summary.epochs_trained:,} trained, {summary.epochs_saved:,} saved by pruning"
        + (f" ({summary.epochs_saved / full:.0%})" if full else ""),
        "time": duration(summary.seconds)
        + (f", {summary.overhead:.1%} of the workers' time outside training" if summary.overhead is not None else ""),
    }
    grid = Table.grid(padding=(0, 2))
    for name, value in rows.items():
        grid.add_row(f"[dim]{name}", value)
    console.print(grid)
    if summary.best:
        console.print(leaderboard_table(summary.best))


def leaderboard_table(trials: tuple[FrozenTrial, ...]) -> Table:
    """Candidates, best first. Accuracy is the mean over the last two epochs on the validation images."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name, justify in (("rank", "right"), ("trial", "right"), ("accuracy", "right"), ("parameters", "right")):
        table.add_column(name, justify=justify, no_wrap=True)
    table.add_column("architecture", overflow="fold")
    for rank, trial in enumerate(trials, 1):
        record = TrialRecord.from_trial(trial)
        origin = f" ({record.origin})" if record.origin else ""
        table.add_row(
            str(rank),
            str(trial.number),
            f"{trial.value:.2%}",
            f"{record.n_parameters:,}",
            Text(record.architecture + origin),
        )
    return table
