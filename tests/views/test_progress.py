"""What people see while something runs, on a terminal and elsewhere; also of a real search with two workers."""

import io
import re

import pytest
from optuna.trial import create_trial
from rich.console import Console

from nas_mnist.stages import confirm, search
from nas_mnist.stages.confirm import ConfirmSettings
from nas_mnist.stages.planned import RunsBegan, RunStarted
from nas_mnist.stages.search import SearchBegan, SearchSettings
from nas_mnist.stages.trial import EpochTrained, TrialEnded, TrialStarted
from nas_mnist.study import studies
from nas_mnist.study.records import TrialCounts
from nas_mnist.study.storage import Outage, OutageEnded, Storage
from nas_mnist.training.loop import EpochResult
from nas_mnist.views import progress, report
from nas_mnist.views.progress import RunDisplay, SearchDisplay
from nas_mnist.workers.events import Worker, WorkerDied

WORKERS = [Worker(0, "cpu"), Worker(1, "cuda:0")]
LINE = "c8 M c16 G c10k1-"
SETTINGS = SearchSettings(Storage("sqlite:///s.db"), n_trials=4, epochs=5)


def new_console(*, terminal=True, get_time=None):
    """One that keeps what it has printed: all frames of a live display, one after the other."""
    return Console(
        file=io.StringIO(),
        record=True,
        force_terminal=terminal,
        width=130,
        get_time=get_time,
        _environ={"TERM": "xterm"},
    )


def frame(console, live):
    """What stands on the terminal now."""
    console.export_text()
    live.refresh()
    return console.export_text()


def epoch(trial, number, accuracy=0.97, of=SETTINGS.epochs):
    return EpochTrained(trial, EpochResult(number, 0.2, 0.9, 0.1, accuracy, 0.01, 2.0, 0.5), of)


def ended(trial, n_epochs=5, accuracy=0.97, over_budget=False):
    return TrialEnded(trial, over_budget, f"after epoch {n_epochs}", accuracy)


def show_search(events, *, terminal=False, quiet=False, verbose=False, settings=SETTINGS):
    """What a search with these events, each of a worker, has printed."""
    console = new_console(terminal=terminal)
    with SearchDisplay(console, settings, WORKERS, quiet=quiet, verbose=verbose) as display:
        for worker, event in events:
            display(worker, event)
    return console.export_text()


SOME_EVENTS = [
    (WORKERS[0], TrialStarted(0, LINE, 1234)),
    (WORKERS[0], epoch(0, 1)),
    (WORKERS[0], ended(0, accuracy=0.9812)),
    (WORKERS[1], TrialStarted(1, LINE, 4321)),
    (WORKERS[1], ended(1, n_epochs=3, accuracy=None)),
    (WORKERS[1], ended(2, n_epochs=0, accuracy=None, over_budget=True)),
]

# --- a search --------------------------------------------------------------------------------------------------------


def test_live_display_has_a_line_for_each_worker_the_bar_and_the_best():
    console = new_console()
    with SearchDisplay(console, SETTINGS, WORKERS, quiet=False, verbose=False) as display:
        assert "no candidate has been trained to the end yet" in frame(console, display._live)
        for worker, event in SOME_EVENTS:
            display(worker, event)
        display(WORKERS[1], TrialStarted(3, LINE, 777))
        display(WORKERS[1], epoch(3, 2, accuracy=0.9355))
        lines = frame(console, display._live).splitlines()
    assert re.search(r"trials .* 2/4 ", lines[0])
    assert lines[1].split("  ")[0] == "cpu #0" and "waiting" in lines[1]
    assert re.fullmatch(rf"cuda:0 #1 +trial 3 +epoch 2/5 +93.55% +{re.escape(LINE)} *", lines[2])
    assert lines[3].strip() == f"best 98.12%  1,234 parameters  {LINE}"


def test_live_display_tells_a_short_run_from_the_long_one():
    console = new_console()
    with SearchDisplay(console, SETTINGS, WORKERS, quiet=False, verbose=False) as display:
        display(WORKERS[1], TrialStarted(3, LINE, 777))
        display(WORKERS[1], epoch(3, 3, accuracy=0.9355, of=3))
        short = frame(console, display._live).splitlines()[2]
        display(WORKERS[1], epoch(3, 1, accuracy=0.9111))
        long = frame(console, display._live).splitlines()[2]
    assert re.search(r"trial 3 +short run, 3/3 +93.55%", short) and re.search(r"trial 3 +epoch 1/5 +91.11%", long)


def test_live_display_leaves_only_the_lines_of_finished_trials():
    console = new_console()
    with SearchDisplay(console, SETTINGS, WORKERS, quiet=False, verbose=False) as display:
        for worker, event in SOME_EVENTS:
            display(worker, event)
        assert display._live.is_started and display._live.transient
    assert not display._live.is_started


def test_elsewhere_each_finished_trial_is_a_plain_line():
    assert show_search(SOME_EVENTS).splitlines() == [
        f"1/4  trial 0: 98.12%, 1,234 parameters, {LINE}",
        f"2/4  trial 1: pruned after epoch 3, 4,321 parameters, {LINE}",
    ]


def test_verbose_tells_every_epoch_and_what_was_over_the_budget():
    lines = show_search(SOME_EVENTS, verbose=True).splitlines()
    assert lines[0] == "  trial 0: epoch 1/5, 97.00%, loss 0.1000, 2.5 s"
    assert lines[-1] == "trial 2: over the budget, not trained" and len(lines) == 4


@pytest.mark.parametrize("terminal", [False, True])
def test_quiet_says_nothing(terminal):
    assert show_search(SOME_EVENTS, quiet=True, terminal=terminal) == ""


def test_search_that_goes_on_counts_what_is_trained_already_and_keeps_its_best():
    best = create_trial(value=0.99, user_attrs={"architecture": LINE, "n_parameters": 1000})
    console = new_console()
    with SearchDisplay(console, SETTINGS, WORKERS, quiet=False, verbose=False) as display:
        display(None, SearchBegan(2, best))
        display(WORKERS[0], TrialStarted(5, "c10k28-", 7850))
        display(WORKERS[0], ended(5, accuracy=0.98))
        shown = console.export_text(clear=False)
        last = frame(console, display._live)
    assert "2 trials of study 'nas-mnist' are trained already" in shown and "3/4  trial 5: 98.00%" in shown
    assert f"best 99.00%  1,000 parameters  {LINE}" in last and " 3/4 " in last


def test_time_left_is_that_of_the_epochs_to_come():
    now = [1000.0]
    console = new_console(get_time=lambda: now[0])
    with SearchDisplay(console, SETTINGS, WORKERS, quiet=False, verbose=False) as display:
        display(WORKERS[0], TrialStarted(0, LINE, 1))
        for number in range(1, 6):
            display(WORKERS[0], epoch(0, number))
        assert "left" not in frame(console, display._live), "nothing is known before a trial has ended"
        now[0] += 50.0
        display(WORKERS[0], ended(0))
        assert "about 2 min 30 s left" in frame(console, display._live)  # three trials, of 50 s each


def test_trouble_is_told_in_one_line_each():
    lines = show_search(
        [
            (WORKERS[1], WorkerDied("Traceback …\nRuntimeError: no luck")),
            (WORKERS[0], Outage("connection refused", 60)),
            (WORKERS[0], OutageEnded(7.2)),
        ]
    ).splitlines()
    assert lines == [
        "worker 1 died (RuntimeError: no luck) and is started again; its trial is queued again",
        "worker 0 waits, up to 1 min 00 s: the storage does not answer; connection refused",
        "worker 0 goes on: the storage answers again after 7 s",
    ]


# --- jobs ------------------------------------------------------------------------------------------------------------


def run_planned(display, *, epochs_per_run, given_up_after=None):
    """Two jobs, one after the other, the second of which may be given up."""
    display(None, RunsBegan(2, 0, epochs_per_run))
    for job, n_epochs in enumerate((epochs_per_run, given_up_after or epochs_per_run)):
        display(WORKERS[0], RunStarted(job, f"job {job}"))
        for number in range(1, n_epochs + 1):
            display(WORKERS[0], epoch(job, number))
        display(WORKERS[0], ended(job, n_epochs, 0.9912 if n_epochs == epochs_per_run else None))


@pytest.mark.parametrize(("epochs_per_run", "given_up_after", "n_epochs"), [(5, None, 10), (15, None, 30), (20, 4, 24)])
def test_bar_of_jobs_ends_full_whatever_their_epochs(epochs_per_run, given_up_after, n_epochs):
    console = new_console()
    with RunDisplay(console) as display:
        run_planned(display, epochs_per_run=epochs_per_run, given_up_after=given_up_after)
        assert f" {n_epochs}/{n_epochs} " in frame(console, display._progress)


def test_epochs_of_a_worker_that_died_are_trained_once_more():
    console = new_console()
    with RunDisplay(console) as display:
        display(None, RunsBegan(1, 0, 3))
        display(WORKERS[1], RunStarted(0, "job 0"))
        display(WORKERS[1], epoch(0, 1))
        display(WORKERS[1], WorkerDied("killed by signal 9"))
        assert " 1/4 " in frame(console, display._progress)


def test_bar_of_jobs_names_what_each_worker_is_at():
    console = new_console()
    with RunDisplay(console) as display:
        display(None, RunsBegan(4, 3, 2))
        display(WORKERS[0], RunStarted(0, "era1a7 seed 0"))
        display(WORKERS[1], RunStarted(1, "lite-m1 seed 0"))
        display(WORKERS[1], epoch(1, 1))
        line = frame(console, display._progress)
    assert "epochs" in line and " 1/8 " in line and "era1a7 seed 0, lite-m1 seed 0" in line


def test_elsewhere_each_finished_job_is_a_plain_line():
    console = new_console(terminal=False)
    with RunDisplay(console) as display:
        display(None, RunsBegan(2, 1, 9))
        run_planned(display, epochs_per_run=9, given_up_after=2)
        display(WORKERS[1], WorkerDied("killed by signal 9"))
    assert console.export_text().splitlines() == [
        "runs done already: 1; left: 2",
        "job 0: 99.12%",
        "job 1: ended early",
        "worker 1 died (killed by signal 9) and is started again; its run is queued again",
    ]


# --- for real --------------------------------------------------------------------------------------------------------


def test_real_search_and_confirmation_with_two_workers_are_shown_as_they_run(tmp_path, data_dir):
    storage = Storage.parse(str(tmp_path / "s.db"))
    common = {"storage": storage, "study_name": "it[s]", "train_images": 200, "data_dir": data_dir}
    settings = SearchSettings(**common, n_trials=3, epochs=2, max_params=300)
    workers = [Worker(0, "cpu"), Worker(1, "cpu")]
    seen, text = follow(settings, workers, lambda show: search.search(settings, workers, show))
    assert "searching below 300 parameters, to 3 trials (study 'it[s]')" in text
    assert len(re.findall(r"[123]/3  trial \d: [\d.]+%, \d+ parameters, c\d+ ", text)) == 3
    epochs = [(worker, event, shown) for worker, event, shown in seen if isinstance(event, EpochTrained)]
    assert len(epochs) == 6
    for worker, event, shown in epochs:
        accuracy = f"{event.epoch.eval_accuracy:.2%}"
        line = rf"cpu #{worker.index} +trial {event.trial} +epoch {event.epoch.number}/2 +{accuracy} +c"
        assert re.search(line, shown) and f"cpu #{1 - worker.index} " in shown
    assert re.search(r"trials .* 3/3 ", seen[-1][2]) and re.search(r"best [\d.]+%  \d+ parameters  c", seen[-1][2])

    study = studies.load(storage.open(), "it[s]")
    assert TrialCounts.of(study.get_trials()).waiting == 0, "three of the six warm starts were queued"
    assert "not finished" not in report.page(study)

    confirmed = ConfirmSettings(**common, top=2, n_folds=2)
    seen, text = follow(confirmed, workers, lambda show: confirm.confirm(confirmed, workers, show))
    assert "confirming the best (study 'it[s]')" in text
    assert len(re.findall(r"trial \d, fold 2, seed 0: [\d.]+%", text)) == 2
    assert " 8/8 " in seen[-1][2], "two candidates on two folds, two epochs each"


def follow(stage, workers, run):
    """Each event of a stage with its worker and what the terminal shows then, and all that was printed."""
    console, seen, printed = new_console(), [], []
    with progress.follow(console, stage, workers) as display:
        live = display._live if isinstance(display, SearchDisplay) else display._progress

        def show(worker, event):
            display(worker, event)
            if event is not None:
                printed.append(console.export_text())
                live.refresh()
                seen.append((worker, event, console.export_text()))

        run(show)
    return seen, "".join(printed)
