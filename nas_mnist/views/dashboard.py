"""optuna-dashboard on the studies of a storage, and what it shows there besides the numbers.

`publish` brings notes, plots and pictures up to date from what the database holds. It can be run at any time and again:
what is there already is left alone, so nothing is lost if a search is killed before it came to it.
"""

import contextlib
import io
import socket
import threading
import webbrowser
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path

import optuna
import torch
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial
from optuna_dashboard import save_note, save_plotly_graph_object
from optuna_dashboard.artifact import get_artifact_path

from nas_mnist.data.datasets import Dataset
from nas_mnist.data.images import Images, load_train
from nas_mnist.data.unpacking import prepare
from nas_mnist.errors import DataError, StudyError
from nas_mnist.extras import Extra
from nas_mnist.model.architecture import parse
from nas_mnist.model.diagram import svg
from nas_mnist.stages import search
from nas_mnist.study import studies
from nas_mnist.study.artifacts import Artifacts
from nas_mnist.study.records import TrialRecord, leaderboard
from nas_mnist.study.snapshot import copied, reason_to_copy
from nas_mnist.study.storage import Storage
from nas_mnist.views import figures, notes

DRAWING, CURVES, PICTURE = "network.svg", "curves.png", "misclassified.png"
N_MISTAKES_SHOWN = 100  # a bad network has thousands
PLOT_HEIGHT = 440  # pixels, of the dashboard's cards


def serve(storage: Storage, host: str, port: int, data_dir: Path, *, open_browser: bool = False) -> None:
    """Serve until interrupted; of a database that must stay as it is, a copy.

    Raises `StudyError` if there is no database or the port is taken.
    """
    from optuna_dashboard import run_server

    replace(storage, read_only=True).open()
    _check_port(host, port)
    reason = reason_to_copy(storage)
    with copied(storage) if reason else contextlib.nullcontext(storage) as shown:
        opened = shown.open()
        for name in studies.names(opened):
            publish(shown, name, data_dir)
        url = f"http://{host}:{port}/dashboard/"
        print(f"optuna-dashboard for {storage}: {url} (Ctrl-C ends it)", flush=True)
        if reason:
            print(f"a copy of the database as it is now ({reason}); notes written there are not kept", flush=True)
        if open_browser:
            threading.Timer(1.0, webbrowser.open, [url]).start()  # when the server listens
        shown.artifacts.mkdir(parents=True, exist_ok=True)
        store = Artifacts(None, shown.artifacts).store
        _until_interrupted(partial(run_server, opened, host=host, port=port, artifact_store=store))


def _until_interrupted(run: Callable[[], None]) -> None:
    """In a thread of its own: within a request a server takes `KeyboardInterrupt` for an error of it, and goes on."""
    ended: Future[None] = Future()

    def work() -> None:
        try:
            ended.set_result(run())
        except BaseException as error:  # whoever waits is to hear of it, whatever it is
            ended.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    ended.result()


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or "no name of a host"
            raise StudyError(f"cannot listen on {host}:{port} ({reason}): choose another port", "port") from error


def publish(storage: Storage, study_name: str, data_dir: Path) -> None:
    """Bring everything that the dashboard shows of a study up to date; of a search also which files are kept.

    A study that is not ours is left as it is.
    """
    with storage.lock(purpose="notes"):  # two of these at once would mix their plots
        study = studies.load(storage.open(), study_name)
        if not studies.is_ours(study):
            return
        artifacts = Artifacts(study, storage.artifacts)
        trials = study.get_trials(deepcopy=False)
        best = leaderboard(trials)
        if search.KEEP_WEIGHTS in study.user_attrs:
            kept = best[: study.user_attrs[search.KEEP_WEIGHTS]]
            _drop_files(artifacts, trials, kept)
            dataset = studies.recorded_dataset(studies.recorded_identity(study))
            _draw_pictures(artifacts, kept, data_dir, dataset)
            if not Extra.report.missing:
                _save_plots(study, trials, dataset)
        _write_trial_notes(artifacts, trials)
        command = study.user_attrs.get(search.COMMAND)
        save_note(study, notes.study_note(study, trials, best, artifacts.n_bytes(), command))


def _save_plots(study: optuna.Study, trials: list[FrozenTrial], dataset: Dataset) -> None:
    from nas_mnist.views.study_figures import NothingToDraw, accuracy_against_parameters, epochs_spent, learning_curves

    identity = studies.recorded_identity(study)
    plots = {
        "accuracy against parameters": lambda: accuracy_against_parameters(
            trials, identity["max_params"], dataset=dataset
        ),
        "learning curves of the best ten": lambda: learning_curves(trials),
        "epochs spent": lambda: epochs_spent(trials, identity["epochs"]),
    }
    for title, draw in plots.items():
        with contextlib.suppress(NothingToDraw):
            figure = draw().update_layout(title=title[0].upper() + title[1:], margin_t=60, height=PLOT_HEIGHT)
            save_plotly_graph_object(study, figure, graph_object_id=title.replace(" ", "-"))


def _drop_files(artifacts: Artifacts, trials: list[FrozenTrial], kept: tuple[FrozenTrial, ...]) -> None:
    """Weights and pictures of candidates that are not among the best any more; every trial keeps its drawing."""
    numbers, files = {trial.number for trial in kept}, artifacts.all()
    for trial in trials:
        if trial.state.is_finished() and trial.number not in numbers:
            for name, artifact_id in files.get(trial._trial_id, {}).items():
                if name != DRAWING:
                    artifacts.remove(trial, artifact_id)


def _draw_pictures(artifacts: Artifacts, kept: tuple[FrozenTrial, ...], data_dir: Path, dataset: Dataset) -> None:
    """Learning curves of the best, and the validation images they take for another digit."""
    files = artifacts.all()
    for trial in kept:
        there = files.get(trial._trial_id, {})
        if artifacts.lacks(there.get(CURVES)):
            epochs = TrialRecord.from_trial(trial).epochs
            artifacts.put(trial, CURVES, _png(figures.curves([epochs], "validation")), there.get(CURVES))
        if artifacts.lacks(there.get(PICTURE)):
            # Its data or files may be on another machine: the rest is worth showing without.
            with contextlib.suppress(StudyError, DataError):
                _draw_mistakes_of(trial, artifacts, there.get(PICTURE), data_dir, dataset)


def _draw_mistakes_of(
    trial: FrozenTrial, artifacts: Artifacts, artifact_id: str | None, data_dir: Path, dataset: Dataset
) -> None:
    mistakes = artifacts.mistakes_of(trial)
    if mistakes is not None:
        prepare(data_dir, dataset)
        picture = _draw_mistakes(mistakes, load_train(data_dir, dataset), dataset)
        artifacts.put(trial, PICTURE, _png(picture), artifact_id)


def _draw_mistakes(mistakes: list[tuple[int, int, int]], images: Images, dataset: Dataset) -> Figure:
    shown = torch.tensor(mistakes[:N_MISTAKES_SHOWN]).reshape(-1, 3)
    title = f"{len(mistakes)} validation images wrong: true → predicted"
    every = torch.arange(len(shown))
    return figures.mistakes(images.pixels[shown[:, 0]], shown[:, 1], shown[:, 2], every, dataset.classes, title)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _write_trial_notes(artifacts: Artifacts, trials: list[FrozenTrial]) -> None:
    """A drawing and a note for each trial that has drawn its network, once; a drawing that is gone is drawn again."""
    files = artifacts.all()
    for trial in trials:
        known = files.get(trial._trial_id, {}).get(DRAWING)
        architecture = TrialRecord.from_trial(trial).architecture
        if architecture and artifacts.lacks(known):
            artifact_id = artifacts.put(trial, DRAWING, svg(parse(architecture)).encode(), known)
            if known is None:
                live = optuna.Trial(artifacts.study, trial._trial_id)  # what the dashboard's own functions take
                save_note(live, notes.trial_note(trial, get_artifact_path(live, artifact_id)))
